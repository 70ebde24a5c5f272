"""The project's own files that a run reads back: sealed when written, and checked before use.

A seal is a checksum inside the file: the text `pairvpr-seal:` and the sha256 of the whole file with these 64 digits
read as zeros. JSON has it as the last entry `seal`, Parquet in the footer's metadata under `seal`, zip archives (.npz,
.pt) in the archive's comment. It is published atomically with the file, and covers every byte.

Files of earlier versions have no seal. They are still read; their types and sizes are checked as for all others. Files
that an index lists with size and sha256 (.npy, .faiss) need no seal.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import types
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import IO, Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

from pairvpr.data import storage
from pairvpr.errors import UserError
from pairvpr.terminal import say

T = TypeVar("T")

KEY = "seal"
_PREFIX = "pairvpr-seal:"
_NUM_DIGITS = 64
_NO_SEAL = _PREFIX + "0" * _NUM_DIGITS
_BUFFER_BYTES = 1 << 20
_FOOTER_BYTES = 1 << 20
"""In which the seal of a Parquet file is looked for."""
_MOST_INTEGER = (1 << 63) - 1


class DamagedFileError(UserError):
    """One of the project's own files is damaged; the message names it and what to do."""

    def __init__(self, url: str, what: str, remedy: str) -> None:
        super().__init__(f"{url} is damaged: {what}; {remedy}")
        self.arguments = (url, what, remedy)

    def __reduce__(self) -> tuple[type[DamagedFileError], tuple[str, str, str]]:
        return type(self), self.arguments


def warn(error: DamagedFileError) -> None:
    """Say in one line that a file is damaged and how it is repaired."""
    say(f"warning: {error}")


def write_json(url: str, content: Mapping[str, Any]) -> None:
    """Publish an object as sealed JSON, atomically."""
    storage.write_bytes(url, json_bytes(content))


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """An object as sealed, indented JSON. The same content gives the same bytes."""
    return _sealed(storage.json_bytes({**content, KEY: _NO_SEAL}))


def read_json(url: str, remedy: str) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is no such file.

    Raises `DamagedFileError`, which ends with `remedy`, if it is not a JSON object or a byte has changed, and
    `UserError` if a local file can't be read.
    """
    data = read_bytes(url)
    return None if data is None else parse_json(data, url, remedy)


def parse_json(data: bytes, url: str, remedy: str) -> dict[str, Any]:
    """The object in these bytes, read from `url`. Raises `DamagedFileError` as `read_json` does."""
    has_seal = _check_seal(data, url, remedy)
    try:
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(url, f"not JSON ({storage.reason(error)})", remedy) from error
    if not isinstance(content, dict):
        raise DamagedFileError(url, "not a JSON object", remedy)
    if (content.pop(KEY, None) is not None) != has_seal:
        raise DamagedFileError(url, "its seal is broken", remedy)
    return content


def write_parquet(url: str, table: pa.Table, compression: str = "snappy") -> None:
    """Publish a table as sealed Parquet, atomically."""
    storage.write_bytes(url, parquet_bytes(table, compression))


def parquet_bytes(table: pa.Table, compression: str = "snappy") -> bytes:
    """A table as sealed Parquet. Equal tables give equal bytes."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, compression=compression) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({KEY: _NO_SEAL})
    return _sealed(sink.getvalue())


def read_parquet(url: str, schema: pa.Schema, remedy: str) -> pa.Table | None:
    """The table in a Parquet file, or None where there is no such file; see `parse_parquet`."""
    data = read_bytes(url)
    return None if data is None else parse_parquet(data, url, schema, remedy)


def parse_parquet(data: bytes, url: str, schema: pa.Schema, remedy: str) -> pa.Table:
    """The columns of `schema` in these bytes, read from `url`, with the table's metadata.

    Raises `DamagedFileError`, which ends with `remedy`, if it is not Parquet, a byte has changed, or a column is
    missing or of another type.
    """
    has_seal = _check_seal(data, url, remedy)
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        # A footer truncated at a zero byte has lost its seal but still parses; it has also lost its last field.
        if not file.metadata.created_by or (KEY.encode() in (file.metadata.metadata or {})) != has_seal:
            raise DamagedFileError(url, "its seal is broken", remedy)
        _check_size(file.metadata, len(data))
        missing = [field.name for field in schema if field.name not in file.schema_arrow.names]
        if missing:
            raise DamagedFileError(url, f"no column {', '.join(missing)}", remedy)
        table = file.read(columns=schema.names).select(schema.names)
        table.validate(full=True)
        metadata = {key: value for key, value in (table.schema.metadata or {}).items() if key != KEY.encode()}
        return table.cast(schema.with_metadata(metadata or None))
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError, MemoryError) as error:
        if isinstance(error, DamagedFileError):
            raise
        raise DamagedFileError(url, f"not the expected Parquet ({storage.reason(error)})", remedy) from error


@contextmanager
def opened_parquet(url: str, schema: pa.Schema, remedy: str) -> Iterator[pq.ParquetFile]:
    """A sealed Parquet file with the columns of `schema`, checked, to be read in batches: for tables of any size.

    Raises `UserError` where there is no such file, `DamagedFileError` as `parse_parquet`; what a batch itself holds is
    decoded when it is read, inside the block.
    """
    try:
        file = storage.open_input(url)
    except FileNotFoundError as error:
        raise UserError(f"{url}: no such file; {remedy}") from error
    with file:
        has_seal = _check_seal_in_pieces(file, url, remedy)
        try:
            parquet = pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
            if not parquet.metadata.created_by or (KEY.encode() in (parquet.metadata.metadata or {})) != has_seal:
                raise DamagedFileError(url, "its seal is broken", remedy)
            _check_size(parquet.metadata, file.seek(0, io.SEEK_END))
            for field in schema:
                index = parquet.schema_arrow.get_field_index(field.name)
                if index < 0 or parquet.schema_arrow.field(index).type != field.type:
                    raise DamagedFileError(url, f"no column {field.name} of type {field.type}", remedy)
            yield parquet
        except (pa.ArrowException, ValueError, OverflowError, MemoryError) as error:
            raise DamagedFileError(url, f"not the expected Parquet ({storage.reason(error)})", remedy) from error


def _check_seal_in_pieces(file: IO[bytes], url: str, remedy: str) -> bool:
    """As `_check_seal`, of a file that is never in memory as a whole. Its seal stands in the footer, near the end."""
    size = file.seek(0, io.SEEK_END)
    first_looked_at = max(0, size - _FOOTER_BYTES)
    file.seek(first_looked_at)
    found = file.read().rfind(_PREFIX.encode())
    if found < 0:
        return False
    first = first_looked_at + found + len(_PREFIX)
    file.seek(first)
    digits = file.read(_NUM_DIGITS)
    digest = hashlib.sha256()
    for start, stop in ((0, first), (first + _NUM_DIGITS, size)):
        if start:
            digest.update(b"0" * _NUM_DIGITS)
        file.seek(start)
        while start < stop and (piece := file.read(min(stop - start, storage.PIECE_BYTES))):
            digest.update(piece)
            start += len(piece)
    if digits != digest.hexdigest().encode():
        raise DamagedFileError(url, "its bytes are not those of its seal", remedy)
    return True


def _check_size(metadata: Any, num_bytes: int) -> None:
    """Raise `ValueError` if a footer claims more rows than the file can hold, before anything is allocated."""
    if metadata.num_rows > num_bytes or metadata.num_row_groups > num_bytes:
        raise ValueError(f"{metadata.num_rows:,} rows in {num_bytes:,} bytes")


def seal_archive(file: IO[bytes]) -> None:
    """Seal a zip archive (.npz, .pt), open for reading and writing, before it is published. Reads it in pieces."""
    with zipfile.ZipFile(file, "a") as archive:
        archive.comment = _NO_SEAL.encode()
    digest = _archive_digest(file)
    file.seek(-_NUM_DIGITS, io.SEEK_END)
    file.write(digest.encode())


def check_archive(file: IO[bytes], url: str, remedy: str) -> None:
    """Read an archive once, in pieces, and raise `DamagedFileError` if it has a seal and a byte has changed.

    The file's position is back at the start afterwards.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - len(_NO_SEAL)))
    tail = file.read()
    file.seek(0)
    if tail.startswith(_PREFIX.encode()) and tail[-_NUM_DIGITS:].decode("latin-1") != _archive_digest(file):
        raise DamagedFileError(url, "its bytes are not those of its seal", remedy)
    if not tail.startswith(_PREFIX.encode()) and _has_comment(file):
        raise DamagedFileError(url, "its seal is broken", remedy)
    file.seek(0)


def _archive_digest(file: IO[bytes]) -> str:
    """sha256 of an archive whose last 64 bytes are read as zeros."""
    left = file.seek(0, io.SEEK_END) - _NUM_DIGITS
    file.seek(0)
    digest = hashlib.sha256()
    while left > 0 and (piece := file.read(min(left, storage.PIECE_BYTES))):
        digest.update(piece)
        left -= len(piece)
    digest.update(b"0" * _NUM_DIGITS)
    return digest.hexdigest()


def _has_comment(file: IO[bytes]) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return bool(archive.comment)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False  # not an archive: its reader reports that


def parsed(of: type[T], content: object, url: str, remedy: str) -> T:
    """A dataclass instance from JSON: exactly its fields, of the right types, integers 0 or more, numbers finite.

    Raises `DamagedFileError` for anything else, and if `__post_init__` raises `ValueError`.
    """
    try:
        return cast(T, _value(of, content, ""))
    except (TypeError, ValueError, OverflowError) as error:
        raise DamagedFileError(url, storage.reason(error), remedy) from error


def _value(of: Any, value: Any, name: str) -> Any:
    """`value` as the type `of`. Raises `ValueError`, with the dotted `name`, if it is of another type."""
    origin = get_origin(of)
    if of is Any:
        return value
    if origin in (Union, types.UnionType):
        others = [one for one in get_args(of) if one is not types.NoneType]
        return None if value is None else _value(others[0], value, name)
    if origin is list and isinstance(value, list):
        return [_value(get_args(of)[0], item, f"{name}[{number}]") for number, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        key_of, value_of = get_args(of)
        return {_key(key_of, key, name): _value(value_of, item, f"{name}.{key}") for key, item in value.items()}
    if is_dataclass(of) and isinstance(value, dict):
        return _instance(cast(Any, of), value, name)
    if of is int and type(value) is int and 0 <= value <= _MOST_INTEGER:
        return value
    if of is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if of in (str, bool) and type(value) is of:
        return value
    raise ValueError(f"{name or 'it'} is {str(value)[:40]!r}, expected {getattr(of, '__name__', of)}")


def _key(of: type, key: str, name: str) -> Any:
    """A key of a JSON object, where integers are text."""
    if of is not int:
        return key
    if not key.isdecimal():
        raise ValueError(f"{name} has the key {key[:40]!r}, expected an integer")
    return int(key)


def _instance(of: Any, content: dict[str, Any], name: str) -> Any:
    wrong = sorted(content.keys() ^ {item.name for item in fields(of)})
    if wrong:
        raise ValueError(f"missing or unknown {', '.join(wrong)}{f' in {name}' if name else ''}")
    hints = get_type_hints(of)
    return of(**{key: _value(hints[key], value, f"{name}.{key}" if name else key) for key, value in content.items()})


def read_bytes(url: str) -> bytes | None:
    """All bytes of a file, or None if there is none. Raises `UserError`, naming it, if it can't be read."""
    try:
        return storage.read_bytes(url)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except storage.StorageError:
        raise
    except OSError as error:
        raise UserError(f"{url}: can't be read: {storage.reason(error)}") from error


def _sealed(data: bytes) -> bytes:
    """The bytes with the digits of their last seal (zeros so far) filled in."""
    first = data.rindex(_NO_SEAL.encode()) + len(_PREFIX)
    return b"".join([data[:first], hashlib.sha256(data).hexdigest().encode(), data[first + _NUM_DIGITS :]])


def _check_seal(data: bytes, url: str, remedy: str) -> bool:
    """Whether there is a seal. Raises `DamagedFileError` if it does not match these bytes."""
    first = data.rfind(_PREFIX.encode())
    if first < 0:
        return False
    first += len(_PREFIX)
    digits, rest = data[first : first + _NUM_DIGITS], data[first + _NUM_DIGITS :]
    digest = hashlib.sha256(data[:first])
    digest.update(b"0" * _NUM_DIGITS)
    digest.update(rest)
    if digits != digest.hexdigest().encode():
        raise DamagedFileError(url, "its bytes are not those of its seal", remedy)
    return True
