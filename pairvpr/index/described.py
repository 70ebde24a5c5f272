"""Photos of an index whose files have changed since they were described. n photos."""

from __future__ import annotations

import posixpath

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pairvpr.data import stamps, storage
from pairvpr.data.manifest import Manifest
from pairvpr.index.generations import ImageTable, IndexManifest

CHANGED = "it has changed since it was described"


class DescribedPhotos:
    """The photos of an index with their stamps at the time of description, kept in memory.

    Photos without stamps, described by an earlier version, never count as changed.
    """

    def __init__(self, directory: str, manifest: IndexManifest, photos: Manifest) -> None:
        self._photos = photos
        self._tables = [(table, stamps.read(folder)) for table, folder in described_tables(directory, manifest)]

    def changed(self, image_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The photos among some (n,) that have changed. One request per photo; a missing photo does not count as
        changed.

        Raises `StorageError` if storage can't be reached.
        """
        changed = [np.empty(0, np.int64)]
        for table, before in self._tables:
            ids = image_ids[(image_ids >= table.first_id) & (image_ids < table.first_id + table.count)]
            if before is not None and len(ids):
                then = before.take(pa.array(ids - table.first_id))
                changed.append(ids[stamps.changed(then, stamps.stamps_of(self._photos, ids))])
        return np.concatenate(changed)


def described_tables(directory: str, manifest: IndexManifest) -> list[tuple[ImageTable, str]]:
    """The tables of photos of an index, each with the directory of its description."""
    folders = [posixpath.dirname(table.file.path) for table in manifest.images]
    directories = [storage.join(directory, folder) if folder else directory for folder in folders]
    return list(zip(manifest.images, directories, strict=True))
