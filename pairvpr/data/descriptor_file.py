"""Global descriptors of photos in somebody's file: what it holds, and some of its rows, however large it is.

A `.npy` array (n, G) with a list of n paths beside it (`FILE.txt` of `FILE.npy`, one a line), or Parquet with the
columns `path` and `descriptor` (lists of G). Values are float16 or float32. n rows, G descriptor width.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import compute

from pairvpr.data import storage
from pairvpr.data.manifest import Manifest
from pairvpr.errors import UserError
from pairvpr.terminal import say

pc: Any = compute  # its functions are made at run time, so their types are not known

WIDEST = 16_384
BYTES_AT_ONCE = 32 << 20
_MOST_HEADER_BYTES = 4096
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
EXPECTED = "expected FILE.npy (n, G) with FILE.txt of n paths beside it, or Parquet with path and descriptor"

Rows = Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]


@dataclass(frozen=True, eq=False)
class DescriptorFile:
    """A checked file of descriptors, none of which is read yet; `paths` (n,) say which photo each row is of."""

    url: str
    width: int
    paths: pa.ChunkedArray
    stamp: str
    """What tells its content from another one without reading it (`storage.stamp`)."""

    def rows_of(self, photos: Manifest) -> NDArray[np.int64]:
        """(photos,) the row of each photo, -1 where there is none."""
        return pc.fill_null(pc.index_in(photos.path_column, value_set=self.paths), -1).to_numpy().astype(np.int64)

    def settings(self) -> dict[str, Any]:
        """What of it decides the bytes of an index, in plain values."""
        return {"width": self.width, "file": self.stamp}


def open_descriptors(given: str, key: str) -> DescriptorFile:
    """The file (path or URL) that the setting `key` names, its paths in memory.

    Raises `UserError` for what is no such file, one that was cut short, other widths and number formats, and a path
    that is there twice.
    """
    url, named = storage.absolute(given), f"{key}={given}"
    try:
        stamp = storage.stamp(url)
        if stamp is None:
            raise UserError(f"{named}: no such file; {EXPECTED}")
        if url.lower().endswith(".npy"):
            head = _npy_head(url, named)
            width, paths = head.width, _listed_paths(url, named, head.num_rows)
        else:
            width, paths = _parquet_head(url, named)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{named}: can't be read: {storage.reason(error)}; {EXPECTED}") from error
    if not 1 <= width <= WIDEST or not len(paths):
        raise UserError(f"{named}: {len(paths):,} rows of {width} values; expected rows of 1 to {WIDEST:,} values")
    counts = pc.value_counts(paths)
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        raise UserError(f"{named}: the path {twice[0]['values']} is there twice; expected each photo once")
    return DescriptorFile(url, width, paths, stamp)


def check_photos_of_file(file: DescriptorFile, kinds: dict[str, Manifest], key: str) -> None:
    """Say how many rows are of no photo, and how many photos have no row, and name the first ones.

    `kinds` are the photos that the file is for, by what they are called. Raises `UserError` where no photo of a kind
    has a row, and where a path is that of two photos.
    """
    has_photo, before = np.zeros(len(file.paths), np.bool_), dict[str, Manifest]()
    for kind, photos in kinds.items():
        rows = file.rows_of(photos)
        missing = np.flatnonzero(rows < 0)
        if len(missing) == len(photos):
            raise UserError(
                f"{key}={file.url}: none of the {len(photos):,} {kind} photos has a row: the first photo is "
                f"{photos.path(0)}, the first row's path {file.paths[0]}; expected paths relative to {photos.root}"
            )
        for other_kind, other in before.items():
            both = np.flatnonzero(other.ids_of(photos.path_column) >= 0)
            if len(both):
                raise UserError(
                    f"{key}={file.url}: {photos.path(int(both[0]))} is the path of a {other_kind} photo and of a "
                    f"{kind} photo; expected a file for each (describe.query_descriptors)"
                )
        if len(missing):
            say(
                f"{key}: {len(missing):,} of {len(photos):,} {kind} photos have no row and are left out, the first is "
                f"{photos.path(int(missing[0]))}"
            )
        has_photo[rows[rows >= 0]] = True
        before[kind] = photos
    if not has_photo.all():
        first = file.paths[int(np.argmin(has_photo))]
        say(f"{key}: {int((~has_photo).sum()):,} of {len(has_photo):,} rows are of no photo here, the first is {first}")


def read_rows(url: str, width: int, wanted: NDArray[np.int64]) -> Rows:
    """Some rows of a file, `wanted` (m,) by number, as (places among the wanted (k,), rows (k, G) float32).

    Together the pieces have every wanted row once; each is of bounded size. Raises `UserError` for a row of another
    width, one with NaN or infinite numbers, and a file that is damaged.
    """
    order = np.argsort(wanted, kind="stable")
    pieces = _npy_rows if url.lower().endswith(".npy") else _parquet_rows
    try:
        for places, rows in pieces(url, width, wanted, order):
            is_finite = np.isfinite(rows).all(axis=1)
            if not is_finite.all():
                first = int(wanted[places[int(np.argmin(is_finite))]])
                raise UserError(f"{url}, row {first + 1:,}: NaN or infinite numbers; expected finite ones")
            yield places, rows
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{url}: can't be read: {storage.reason(error)}") from error


@dataclass(frozen=True)
class _NpyHead:
    num_rows: int
    width: int
    dtype: np.dtype[Any]
    offset: int


def _npy_head(url: str, named: str) -> _NpyHead:
    head = io.BytesIO(storage.read_head(url, _MOST_HEADER_BYTES))
    try:
        shape, is_fortran, dtype = _HEADERS[np.lib.format.read_magic(head)](head)
    except (ValueError, KeyError, SyntaxError) as error:
        raise UserError(f"{named}: not a .npy file: {storage.reason(error)}; {EXPECTED}") from error
    if len(shape) != 2 or is_fortran or dtype.kind != "f" or dtype.itemsize not in (2, 4):
        order = " in Fortran order" if is_fortran else ""
        raise UserError(
            f"{named}: an array {shape} of {dtype}{order}; expected (n, G) of float16 or float32 in C order"
        )
    found = _NpyHead(shape[0], shape[1], dtype, head.tell())
    expected_bytes, num_bytes = found.offset + dtype.itemsize * shape[0] * shape[1], storage.size_bytes(url)
    if num_bytes != expected_bytes:
        raise UserError(
            f"{named}: {num_bytes:,} bytes, an array {shape} of {dtype} has {expected_bytes:,}: it was cut short, or "
            "is still being written"
        )
    return found


def _listed_paths(url: str, named: str, num_rows: int) -> pa.ChunkedArray:
    """The paths in the list beside a .npy file."""
    beside = url[: -len(".npy")] + ".txt"
    try:
        lines = storage.read_bytes(beside).decode("utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"{named}: no list of paths beside it; expected {beside} with a path for each row") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{named}: {beside} is not UTF-8; expected a path for each row") from error
    if len(lines) != num_rows or not all(lines):
        raise UserError(
            f"{named}: {num_rows:,} rows, and {sum(map(bool, lines)):,} paths on {len(lines):,} lines of {beside}; "
            "expected a path for each row"
        )
    return pa.chunked_array([pa.array(lines, pa.string())])


def _npy_rows(url: str, width: int, wanted: NDArray[np.int64], order: NDArray[np.int64]) -> Rows:
    head = _npy_head(url, url)
    row_bytes = head.dtype.itemsize * width
    step = max(1, BYTES_AT_ONCE // (4 * width))
    for first in range(0, len(order), step):
        places = order[first : first + step]
        numbers = wanted[places]
        runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
        spans = [(head.offset + int(run[0]) * row_bytes, head.offset + (int(run[-1]) + 1) * row_bytes) for run in runs]
        data = b"".join(storage.read_ranges(url, spans))
        yield places, np.frombuffer(data, head.dtype).reshape(len(places), width).astype(np.float32)


def _parquet_head(url: str, named: str) -> tuple[int, pa.ChunkedArray]:
    """The width of the first row, and all paths."""
    try:
        with storage.open_input(url) as source:
            file = pq.ParquetFile(source)
            _check_columns(file.schema_arrow, named)
            paths = file.read(columns=["path"]).column("path").cast(pa.string())
            first = next(file.iter_batches(batch_size=1, columns=["descriptor"]), None)
    except (pa.ArrowException, ValueError) as error:
        raise UserError(f"{named}: not a whole Parquet file: {storage.reason(error)}; {EXPECTED}") from error
    if paths.null_count:
        raise UserError(f"{named}: {paths.null_count:,} rows have no path; expected one for each")
    width = 0 if first is None else pc.list_value_length(first.column("descriptor"))[0].as_py() or 0
    return width, paths


def _check_columns(schema: pa.Schema, named: str) -> None:
    for name in ("path", "descriptor"):
        if schema.get_field_index(name) < 0:
            raise UserError(f"{named}: its columns are {', '.join(schema.names)}; {EXPECTED}")
    kind = schema.field("descriptor").type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not (pa.types.is_float16(kind.value_type) or pa.types.is_float32(kind.value_type)):
        raise UserError(f"{named}: descriptor is {kind}; expected lists of float16 or float32")


def _parquet_rows(url: str, width: int, wanted: NDArray[np.int64], order: NDArray[np.int64]) -> Rows:
    """Row groups without a wanted row are passed over; of the others some rows at a time are in memory."""
    in_order = wanted[order]
    with storage.open_input(url) as source:
        file = pq.ParquetFile(source)
        stops = np.cumsum([file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)])
        for group, stop in enumerate(stops.tolist()):
            start = stop - file.metadata.row_group(group).num_rows
            if np.searchsorted(in_order, start) == np.searchsorted(in_order, stop):
                continue
            step = max(1, BYTES_AT_ONCE // (4 * width))
            for batch in file.iter_batches(batch_size=step, row_groups=[group], columns=["descriptor"]):
                first, last = np.searchsorted(in_order, [start, start + batch.num_rows])
                rows = _as_rows(batch.column("descriptor"), width, f"{url}, row", start)
                if last > first:
                    yield order[first:last], rows[in_order[first:last] - start]
                start += batch.num_rows


def _as_rows(lists: pa.Array, width: int, named: str, first: int) -> NDArray[np.float32]:
    lengths = pc.fill_null(pc.list_value_length(lists), -1).to_numpy(zero_copy_only=False)
    is_wrong = lengths != width
    if is_wrong.any():
        place = int(np.argmax(is_wrong))
        raise UserError(f"{named} {first + place + 1:,}: {max(0, lengths[place])} values, the first row has {width}")
    values = lists.flatten().to_numpy(zero_copy_only=False)  # null becomes NaN
    return values.reshape(-1, width).astype(np.float32)
