"""CSV files of training sets, with readable errors."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from pairvpr.data import storage
from pairvpr.data.problems import Problems
from pairvpr.data.tables import TableFile
from pairvpr.errors import UserError


def read_csv(url: str, columns: Mapping[str, pa.DataType]) -> pa.Table:
    """The named columns of a table with a header, without nulls.

    Raises `UserError`, naming the file if it can't be read, or the column that is missing or of another type.
    """
    problems = Problems()
    rows = TableFile.open(url).read(list(columns), problems)
    if problems.lines:
        raise UserError(problems.lines[0])
    converted: list[pa.ChunkedArray] = []
    for name, kind in columns.items():
        texts = rows.texts(name)
        if texts.null_count:
            raise UserError(f"{url}: an empty cell in the column {name}; expected {kind} in every row")
        try:
            converted.append(texts.cast(kind))
        except pa.ArrowException as error:
            raise UserError(f"{url}: column {name}: {storage.reason(error)}; expected {kind} in every row") from error
    return pa.table(converted, names=list(columns))
