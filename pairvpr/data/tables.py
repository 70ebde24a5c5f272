"""Tables that people make: CSV (with a header) or Parquet, and a line for each row that can't be used.

A row is called by the number an editor or spreadsheet shows: in a CSV file the header is row 1, blank lines count; in
a Parquet file the first row is row 1.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import compute
from pyarrow import csv as arrow_csv

from pairvpr.data import storage
from pairvpr.data.problems import Problems
from pairvpr.errors import UserError

pc: Any = compute  # its functions are made at run time, so their types are not known

_PARQUET_MAGIC = b"PAR1"
_BLOCK_BYTES = 1 << 24  # a row must fit into it
_DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError)  # what pyarrow raises for it
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"


@dataclass(frozen=True, eq=False)
class Rows:
    """Columns of a table, by name; row i is the one that a person calls `numbers[i]`."""

    url: str
    columns: pa.Table
    numbers: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.numbers)

    def where(self, i: int) -> str:
        """File and row, as messages name them."""
        return f"{self.url}, row {self.numbers[i]}"

    def texts(self, name: str) -> pa.ChunkedArray:
        """A column as text; an empty cell is null. Raises `UserError` for what is not text."""
        texts = _cast(self.url, self.columns.column(name), name, pa.string(), "texts")
        return pc.if_else(pc.equal(texts, ""), None, texts)

    def floats(self, name: str) -> NDArray[np.float64]:
        """A column as numbers; NaN for an empty cell and for what is not a number or not finite.

        Raises `UserError` for a Parquet column of another type.
        """
        column = self.columns.column(name)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            column = pc.utf8_trim_whitespace(column)
            column = pc.if_else(pc.match_substring_regex(column, _NUMBER), column, None)
        values = _cast(self.url, column, name, pa.float64(), "numbers").to_numpy()
        return np.where(np.isfinite(values), values, np.nan)

    def empties(self, name: str) -> NDArray[np.bool_]:
        """(n,) which cells of a column hold nothing, a blank text or NaN."""
        texts = _cast(self.url, self.columns.column(name), name, pa.string(), "texts")
        texts = pc.utf8_lower(pc.utf8_trim_whitespace(texts))
        return pc.is_in(texts, value_set=pa.array(["", "nan", None])).to_numpy()

    def cell(self, name: str, i: int) -> str:
        """What a cell holds, as messages quote it: `latitude is empty`, `latitude is 'x'`."""
        value = self.columns.column(name)[i].as_py()
        return f"{name} is empty" if value is None or str(value).strip() == "" else f"{name} is {str(value)!r}"


@dataclass(frozen=True, eq=False)
class TableFile:
    """The bytes of a table whose columns are known and whose rows are not read yet."""

    url: str
    data: bytes

    @classmethod
    def open(cls, url: str, key: str | None = None) -> TableFile:
        """Read a file; `key` is the setting that named it, if one did. Raises `UserError` where it can't be read."""
        named = url if key is None else f"{key}={url}"
        try:
            return cls(url, storage.read_bytes(url))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise UserError(f"{named}: no such file; expected a CSV or Parquet file") from error
        except OSError as error:
            raise UserError(f"{named}: can't be read: {storage.reason(error)}") from error

    @cached_property
    def names(self) -> list[str]:
        """Names of the columns. Raises `UserError` where the file is neither CSV nor Parquet."""
        if self._is_parquet:
            try:
                return pq.read_schema(pa.BufferReader(self.data)).names
            except _DAMAGE as error:
                raise self._not_a_table(error) from error
        line = self.data.split(b"\n", 1)[0].rstrip(b"\r")
        if b"\0" in line:
            raise UserError(f"{self.url}: not a CSV file: its first line holds a zero byte; expected UTF-8 text")
        try:
            header = next(csv.reader([line.decode("utf-8-sig")], strict=True), [])
        except (UnicodeDecodeError, csv.Error) as error:
            raise self._not_a_table(error) from error
        if not header:
            raise UserError(f"{self.url}: not a CSV file: its first line is empty; expected the names of the columns")
        return header

    def read(self, names: Sequence[str], problems: Problems) -> Rows:
        """The columns `names`; rows of another number of cells are noted and left out, blank ones left out.

        Raises `UserError` where a name is not that of one column, and where the file is damaged.
        """
        missing = sorted(name for name in names if name not in self.names)
        twice = [name for name in names if self.names.count(name) > 1]
        if missing or twice:
            what = f"no column {', '.join(missing)}" if missing else f"more than one column {', '.join(twice)}"
            raise UserError(
                f"{self.url}: {what}; expected {','.join(names)} once each, its header is {','.join(self.names)}"
            )
        try:
            return self._read_parquet(names) if self._is_parquet else self._read_csv(names, problems)
        except _DAMAGE as error:
            raise self._not_a_table(error) from error

    @property
    def _is_parquet(self) -> bool:
        return self.data.startswith(_PARQUET_MAGIC)

    def _read_parquet(self, names: Sequence[str]) -> Rows:
        columns = pq.read_table(pa.BufferReader(self.data), columns=list(names))
        columns.validate(full=True)
        return Rows(self.url, columns, np.arange(1, columns.num_rows + 1))

    def _read_csv(self, names: Sequence[str], problems: Problems) -> Rows:
        left_out: list[int] = []

        def note(row: arrow_csv.InvalidRow) -> str:
            left_out.append(row.number)
            if row.text.strip():
                problems.add(
                    f"{self.url}, row {row.number}: {row.actual_columns} cells, expected {row.expected_columns}"
                )
            return "skip"

        columns = arrow_csv.read_csv(
            pa.BufferReader(self.data),
            # One thread, because only that one knows the numbers of the rows.
            arrow_csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES),
            arrow_csv.ParseOptions(ignore_empty_lines=False, invalid_row_handler=note),
            arrow_csv.ConvertOptions(column_types=dict.fromkeys(self.names, pa.string()), strings_can_be_null=False),
        )
        numbers = np.arange(2, 2 + columns.num_rows + len(left_out))
        rows = Rows(self.url, columns, numbers[~np.isin(numbers, left_out)])
        rows = _without_blank(rows)
        return Rows(self.url, rows.columns.select(list(names)), rows.numbers)

    def _not_a_table(self, error: Exception) -> UserError:
        kind = "Parquet" if self._is_parquet else "CSV"
        return UserError(f"{self.url}: not a {kind} file, or a damaged one: {storage.reason(error)}")


def _without_blank(rows: Rows) -> Rows:
    """A line of which every cell is empty is a blank one; what other columns hold makes it a row."""
    filled = np.zeros(len(rows), dtype=bool)
    for column in rows.columns.columns:
        filled |= pc.not_equal(column, "").to_numpy()
    return rows if filled.all() else Rows(rows.url, rows.columns.filter(pa.array(filled)), rows.numbers[filled])


def _cast(url: str, column: pa.ChunkedArray, name: str, to: pa.DataType, expected: str) -> pa.ChunkedArray:
    try:
        return column.cast(to)
    except pa.ArrowException as error:
        raise UserError(f"{url}: column {name} holds {column.type}; expected {expected}") from error
