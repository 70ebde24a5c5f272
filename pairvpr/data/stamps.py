"""Stamps detect changed photos without reading them: size and modification time, or an ETag.

A description keeps the stamps of its photos, taken before they are read, in `stamps.parquet`: a row for each photo, in
the order of `images.parquet`; null if there was no such file. A local photo costs one `stat`; remote ones cost one
listing of their folder (a request per thousand files).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import compute

from pairvpr.data import sealed, storage
from pairvpr.data.manifest import Manifest
from pairvpr.errors import UserError

pc: Any = compute  # its functions are generated at run time, so their types are unknown

FILE = "stamps.parquet"
SCHEMA = pa.schema([("stamp", pa.string())])
AT_ONCE = 16
PHOTOS_AT_A_TIME = 1 << 16


def stamps(photos: Manifest) -> pa.ChunkedArray:
    """The stamp of every photo, in id order; null if there is no such file."""
    listed = None if storage.is_local(photos.root) else storage.list_stamps(photos.root)
    pieces = []
    for first in range(0, len(photos), PHOTOS_AT_A_TIME):
        paths = photos.path_column.slice(first, PHOTOS_AT_A_TIME).to_pylist()
        found = _each(photos.root, paths) if listed is None else [listed.get(path) for path in paths]
        pieces.append(pa.array(found, pa.string()))
    return pa.chunked_array(pieces, pa.string())


def stamps_of(photos: Manifest, image_ids: NDArray[np.int64]) -> pa.ChunkedArray:
    """The stamps of some photos (n,), with one request each."""
    return pa.chunked_array([pa.array(_each(photos.root, [photos.path(int(i)) for i in image_ids]), pa.string())])


def _each(root: str, paths: Sequence[str]) -> list[str | None]:
    if len(paths) == 1:
        return [storage.stamp(storage.join(root, paths[0]))]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda path: storage.stamp(storage.join(root, path)), paths))


def read(directory: str) -> pa.ChunkedArray | None:
    """The stamps in a description; None if an earlier version made it."""
    remedy = "delete it, and changes of photos since then are not noticed"
    table = sealed.read_parquet(storage.join(directory, FILE), SCHEMA, remedy)
    return None if table is None else table.column("stamp")


def write(directory: str, found: pa.ChunkedArray) -> None:
    """Write the stamps of a description's photos."""
    sealed.write_parquet(storage.join(directory, FILE), pa.table([found], schema=SCHEMA))


def changed(before: pa.ChunkedArray, now: pa.ChunkedArray) -> NDArray[np.int64]:
    """Positions of photos that are different or new files now. A missing photo does not count as changed."""
    same = pc.fill_null(pc.equal(before, now), False)
    other = pc.and_(pc.invert(same), pc.is_valid(now))
    return np.flatnonzero(other.to_numpy())


def check_unchanged(photos: Manifest, directory: str) -> None:
    """Raise `UserError` if photos have changed since the description in `directory` was begun.

    A missing photo does not count as changed: the step that needs it reports it.
    """
    before = read(directory)
    if before is None:
        return
    found = changed(before, stamps(photos))
    if len(found):
        raise UserError(
            f"{photos.root}: {len(found):,} of {len(photos):,} photos have changed since they were described in "
            f"{directory}, the first is {photos.path(int(found[0]))}; expected unchanged photos, or another "
            f"output=. To update an index from build_index: update_index index.path={directory} add=FILE, where "
            "FILE lists their paths"
        )
