"""Versions of the photos that updates added, so that repeating an update has nothing to do."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import compute

from pairvpr.data import sealed, storage
from pairvpr.data.manifest import Manifest
from pairvpr.index.generations import IndexManifest

pc: Any = compute  # its functions are generated at run time, so their types are unknown

FILE = "versions.parquet"
"""Next to the `images.parquet` of an update."""
SCHEMA = pa.schema([("path", pa.string()), ("version", pa.string())])
ASKED_AT_ONCE = 32
REMEDY = "delete it; its photos are then described again when they are added again"


def photo_versions(photos: Manifest) -> pa.Array:
    """(n,) a text for each photo that changes when its file or position does."""
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        files = list(pool.map(storage.version, map(photos.url, range(len(photos)))))
    places = zip(files, photos.utm_m.tolist(), photos.heading_deg.tolist(), strict=True)
    return pa.array([f"{file} {utm_m} {heading_deg}" for file, utm_m, heading_deg in places], pa.string())


def write_versions(directory: str, photos: Manifest, versions: pa.Array) -> None:
    """Write the versions of the photos that an update adds, whose files are in `directory`."""
    table = pa.table([photos.path_column, versions], schema=SCHEMA)
    sealed.write_parquet(storage.join(directory, FILE), table)


def are_there(
    directory: str, manifest: IndexManifest, removed: NDArray[np.int64], photos: Manifest, versions: pa.Array
) -> NDArray[np.bool_]:
    """(n,) whether an update added each of `photos` in this version and it has not been removed since.

    `removed` has the removed ids of `manifest`, ascending. Versions of the photos of the original build are unknown.
    """
    known = []
    for images in manifest.images:
        folder = images.file.path.rpartition("/")[0]
        table = sealed.read_parquet(storage.join(directory, folder, FILE), SCHEMA, REMEDY) if folder else None
        if table is not None:
            ids = np.arange(images.first_id, images.first_id + images.count)
            known.append(_texts(table.filter(pa.array(~np.isin(ids, removed)))))
    if not known:
        return np.zeros(len(photos), np.bool_)
    texts = _texts(pa.table([photos.path_column, versions], schema=SCHEMA))
    return pc.is_in(texts, value_set=pa.chunked_array(known).combine_chunks()).to_numpy(zero_copy_only=False)


def _texts(table: pa.Table) -> pa.Array:
    """(n,) path and version of each row, as one text."""
    columns = [table.column(name).combine_chunks() for name in SCHEMA.names]
    return pc.binary_join_element_wise(*columns, "\n")
