"""Tables made by users: CSV (with a header) or Parquet, with one line for each unusable row.

Rows have the numbers that an editor or spreadsheet shows: in a CSV file the header is row 1, and blank lines count; in
a Parquet file the first row is row 1.
"""

from __future__ import annotations

import csv
import re
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
from pairvpr.data.manifest import Manifest
from pairvpr.data.problems import Problems
from pairvpr.data.spellings import Spellings
from pairvpr.errors import UserError

pc: Any = compute  # its functions are generated at run time, so their types are unknown

_PARQUET_MAGIC = b"PAR1"
_MOST_HEADER_BYTES = 1 << 20
_SEPARATORS = (",", ";", "\t", "|")
_MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
_BLOCK_BYTES = 1 << 24  # a row must fit into it
_DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError)  # what pyarrow raises for it
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_DECIMAL_COMMA = r"^[+-]?\d+,\d+$"
_THOUSANDS = r"^[+-]?[1-9]\d{0,2},\d{3}$"


@dataclass(frozen=True, eq=False)
class Rows:
    """Columns of a table, by name; `numbers[i]` is the number of row i in messages."""

    url: str
    columns: pa.Table
    numbers: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.numbers)

    def where(self, i: int) -> str:
        """File and row, as messages name them."""
        return f"{self.url}, row {self.numbers[i]}"

    def texts(self, name: str) -> pa.ChunkedArray:
        """A column as text; an empty cell is null. Raises `UserError` if it is not text."""
        texts = _cast(self.url, self.columns.column(name), name, pa.string(), "texts")
        return pc.if_else(pc.equal(texts, ""), None, texts)

    def floats(self, name: str, *, below_1000: bool = False) -> NDArray[np.float64]:
        """A column as numbers; NaN for an empty cell and for what is not a number or not finite.

        `8,54` is read with a decimal comma. `500,123` could mean thousands, so it is read with a decimal comma only if
        numbers are known to be `below_1000`. Raises `UserError` for a Parquet column of another type.
        """
        column = self.columns.column(name)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            column = pc.utf8_trim_whitespace(column)
            has_comma = pc.match_substring_regex(column, _DECIMAL_COMMA)
            if not below_1000:
                has_comma = pc.and_not(has_comma, pc.match_substring_regex(column, _THOUSANDS))
            column = pc.if_else(has_comma, pc.replace_substring(column, ",", "."), column)
            column = pc.if_else(pc.match_substring_regex(column, _NUMBER), column, None)
        values = _cast(self.url, column, name, pa.float64(), "numbers").to_numpy()
        return np.where(np.isfinite(values), values, np.nan)

    def empties(self, name: str) -> NDArray[np.bool_]:
        """(n,) whether cells of a column are empty, blank or NaN."""
        texts = _cast(self.url, self.columns.column(name), name, pa.string(), "texts")
        texts = pc.utf8_lower(pc.utf8_trim_whitespace(texts))
        return pc.is_in(texts, value_set=pa.array(["", "nan", None])).to_numpy()

    def cell(self, name: str, i: int) -> str:
        """A cell's content for messages: `latitude is empty`, `latitude is 'x'`."""
        value = self.columns.column(name)[i].as_py()
        return f"{name} is empty" if value is None or str(value).strip() == "" else f"{name} is {str(value)!r}"


@dataclass(frozen=True, eq=False)
class TableFile:
    """The bytes of a table with known columns, whose rows are not parsed yet."""

    url: str
    data: bytes
    """Parquet, or CSV converted by `_as_utf8`."""

    @classmethod
    def open(cls, url: str, key: str | None = None) -> TableFile:
        """Read a file; `key` is the setting that named it, if any. Raises `UserError` if it can't be read."""
        named = url if key is None else f"{key}={url}"
        try:
            data = storage.read_bytes(url)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise UserError(f"{named}: no such file; expected a CSV or Parquet file") from error
        except OSError as error:
            raise UserError(f"{named}: can't be read: {storage.reason(error)}") from error
        return cls(url, data if data.startswith(_PARQUET_MAGIC) else _as_utf8(url, data))

    @cached_property
    def names(self) -> list[str]:
        """Column names, without surrounding spaces. Raises `UserError` if the file is not a table."""
        if self._is_parquet:
            try:
                return pq.read_schema(pa.BufferReader(self.data)).names
            except _DAMAGE as error:
                raise self._not_a_table(error) from error
        return self._header.names

    def has(self, *names: str) -> bool:
        """Whether each of `names` names a column, ignoring case if there is no exact match."""
        return all(self._places(name) for name in names)

    def read(self, names: Sequence[str], problems: Problems) -> Rows:
        """The columns `names`; rows with a wrong number of cells become problems, and blank rows are dropped.

        Raises `UserError` if a name does not match exactly one column, and if the file is damaged.
        """
        missing = sorted(name for name in names if not self.has(name))
        twice = [name for name in names if len(self._places(name)) > 1]
        if missing or twice:
            what = f"no column {', '.join(missing)}" if missing else f"more than one column {', '.join(twice)}"
            raise UserError(
                f"{self.url}: {what}; expected {','.join(names)} once each, but its header is {','.join(self.names)}"
            )
        places = [self._places(name)[0] for name in names]
        try:
            if self._is_parquet:
                columns = pq.read_table(pa.BufferReader(self.data), columns=[self.names[place] for place in places])
                columns = columns.rename_columns(list(names))
                columns.validate(full=True)
                return Rows(self.url, columns, np.arange(1, columns.num_rows + 1))
            return self._read_csv(dict(zip(names, places, strict=True)), problems)
        except _DAMAGE as error:
            raise self._not_a_table(error) from error

    def _places(self, name: str) -> list[int]:
        """The columns that a name matches."""
        exact = [place for place, its_name in enumerate(self.names) if its_name == name]
        return exact or [place for place, its_name in enumerate(self.names) if its_name.casefold() == name.casefold()]

    @property
    def _is_parquet(self) -> bool:
        return self.data.startswith(_PARQUET_MAGIC)

    @cached_property
    def _header(self) -> _Header:
        lines = [*re.split(rb"\r\n|\r|\n", self.data[:_MOST_HEADER_BYTES], maxsplit=2), b"", b""]
        said = re.fullmatch(rb'"?sep=([,;\t|])"?', lines[0])
        line = lines[1] if said else lines[0]
        text = line.decode(errors="backslashreplace")
        separators = [said[1].decode()] if said else [one for one in _SEPARATORS if one in text]
        # A comma takes precedence over other separators, which may be part of names; without any there is one column.
        separator = separators[0] if separators else ","
        try:
            names = next(csv.reader([text], delimiter=separator, strict=True), [])
        except csv.Error as error:
            raise self._not_a_table(error) from error
        if not names:
            raise UserError(f"{self.url}: not a CSV file: its first line is empty; expected the names of the columns")
        return _Header([name.strip() for name in names], separator, 2 if said else 1)

    def _read_csv(self, places: dict[str, int], problems: Problems) -> Rows:
        header, left_out = self._header, list[int]()

        def note(row: arrow_csv.InvalidRow) -> str:
            left_out.append(row.number)
            if row.text.strip():
                problems.add(
                    f"{self.url}, row {row.number}: {row.actual_columns} cells, expected {row.expected_columns}"
                )
            return "skip"

        names = [str(place) for place in range(len(header.names))]
        columns = arrow_csv.read_csv(
            pa.BufferReader(self.data),
            # One thread, because row numbers are only known then.
            arrow_csv.ReadOptions(
                use_threads=False, block_size=_BLOCK_BYTES, column_names=names, skip_rows=header.row - 1
            ),
            arrow_csv.ParseOptions(
                delimiter=header.separator,
                ignore_empty_lines=False,
                newlines_in_values=True,
                invalid_row_handler=note,
            ),
            # Bytes, because unused columns may be in another encoding.
            arrow_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.binary()), strings_can_be_null=False),
        )
        numbers = np.arange(header.row, header.row + columns.num_rows + len(left_out))
        rows = Rows(self.url, columns.slice(1), numbers[~np.isin(numbers, left_out)][1:])
        rows = _without_blank(rows)
        texts = [_as_texts(rows, name, str(place)) for name, place in places.items()]
        return Rows(self.url, pa.table(texts, names=list(places)), rows.numbers)

    def _not_a_table(self, error: Exception) -> UserError:
        kind = "Parquet" if self._is_parquet else "CSV"
        return UserError(f"{self.url}: not a {kind} file, or a damaged one: {storage.reason(error)}")


@dataclass(frozen=True)
class _Header:
    names: list[str]
    separator: str
    row: int
    """Line of the header: 2 after a line such as `sep=;`, which spreadsheets write, otherwise 1."""


def _as_utf8(url: str, data: bytes) -> bytes:
    """CSV text without a byte order mark. Raises `UserError` if it is not text."""
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None)
    if encoding:
        try:
            data = data.decode(encoding).encode()
        except UnicodeDecodeError as error:
            raise UserError(f"{url}: not a CSV file, or a damaged one: {storage.reason(error)}") from error
    if (place := data.find(b"\0")) >= 0:
        row = data.count(b"\n", 0, place) + 1
        raise UserError(f"{url}: not a CSV file: line {row} contains a NUL byte; expected UTF-8 text")
    return data


def _as_texts(rows: Rows, name: str, column_name: str) -> pa.ChunkedArray:
    column = rows.columns.column(column_name)
    try:
        return column.cast(pa.string())
    except pa.ArrowException:
        for i, value in enumerate(column.to_pylist()):
            try:
                value.decode()
            except UnicodeDecodeError as error:
                raise UserError(f"{rows.where(i)}: {name} is {value!r}; expected UTF-8 text") from error
        raise


def find_photos(paths: pa.ChunkedArray, photos: Manifest, *, have_keys: bool = False) -> NDArray[np.int64]:
    """(n,) ids of the photos that cells of a table name, relative to their folder; those of `Spellings` without one.

    A name that is there as it is written stands for itself. If photos `have_keys`, a name may also be a photo's key:
    its file name without ending.
    """
    ids = photos.ids_of(paths)
    unknown = np.flatnonzero(ids < 0)
    if len(unknown) and have_keys:
        keys = pc.replace_substring_regex(photos.path_column, r"(?s)^(?:.*/)?([^/]*)\.[^/.]*$", r"\1")
        ids[unknown] = Manifest.of(photos.root, keys).ids_of(paths.take(pa.array(unknown)))
        unknown = np.flatnonzero(ids < 0)
    if len(unknown):
        spellings = Spellings(photos.path_column.to_pylist())
        ids[unknown] = [spellings.find(paths[i].as_py()) for i in unknown.tolist()]
    return ids


def _without_blank(rows: Rows) -> Rows:
    """Drop rows whose cells are all empty, in other columns, too."""
    filled = np.zeros(len(rows), dtype=bool)
    for column in rows.columns.columns:
        filled |= pc.not_equal(column, pa.scalar(b"", column.type)).to_numpy()
    return rows if filled.all() else Rows(rows.url, rows.columns.filter(pa.array(filled)), rows.numbers[filled])


def _cast(url: str, column: pa.ChunkedArray, name: str, to: pa.DataType, expected: str) -> pa.ChunkedArray:
    try:
        return column.cast(to)
    except pa.ArrowException as error:
        raise UserError(f"{url}: column {name} holds {column.type}; expected {expected}") from error
