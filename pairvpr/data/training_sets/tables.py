"""CSV files of training sets, with errors for people."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
from pyarrow import csv as arrow_csv

from pairvpr.data import storage
from pairvpr.errors import UserError

BLOCK_BYTES = 1 << 24  # a row must fit into it: the photos of a landmark are one row


def read_csv(url: str, columns: Mapping[str, pa.DataType]) -> pa.Table:
    """The named columns of a CSV file with a header, without nulls.

    Raises `UserError`, naming the file, where it can't be read, and the column that is missing or holds something else.
    """
    try:
        data = storage.read_bytes(url)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(f"{url}: no such file; expected a CSV file with the columns {', '.join(columns)}") from error
    except OSError as error:
        raise UserError(f"{url}: can't be read: {storage.reason(error)}") from error
    try:
        header = arrow_csv.open_csv(pa.BufferReader(data), arrow_csv.ReadOptions(block_size=BLOCK_BYTES)).schema.names
    except pa.ArrowInvalid as error:
        raise UserError(f"{url}: not a CSV file: {storage.reason(error)}") from error
    missing = [name for name in columns if name not in header]
    if missing:
        raise UserError(f"{url}: no column {', '.join(missing)}; expected {', '.join(columns)}")
    table = _convert(url, data, columns)
    for name in columns:
        if table.column(name).null_count:
            raise UserError(f"{url}: an empty cell in the column {name}; expected {columns[name]} in every row")
    return table


def _convert(url: str, data: bytes, columns: Mapping[str, pa.DataType]) -> pa.Table:
    options = arrow_csv.ConvertOptions(
        include_columns=list(columns), column_types=dict(columns), strings_can_be_null=False
    )
    try:
        return arrow_csv.read_csv(
            pa.BufferReader(data), arrow_csv.ReadOptions(block_size=BLOCK_BYTES), convert_options=options
        )
    except pa.ArrowException as error:
        expected = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
        raise UserError(f"{url}: {storage.reason(error)}; expected the columns {expected}") from error
