"""From the names of photos to the ids of an index that has changed, where a path may have several ids.

A replaced photo has an id for each of its files. The earlier ones are removed, unless the new file could not be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import compute

from pairvpr.data.manifest import Manifest
from pairvpr.data.tables import find_photos

pc: Any = compute  # its functions are generated at run time, so their types are unknown


@dataclass(frozen=True, eq=False)
class LivePhotos:
    """The `images` of an index, of which an id is live unless it is among `removed` (int64, ascending)."""

    images: Manifest
    removed: NDArray[np.int64]

    def ids_at(self, paths: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
        """All live ids of photos at exactly these paths, ascending. A path may have several, or none."""
        return self._live(pc.is_in(self.images.path_column, value_set=paths))

    def ids_below(self, folder: str) -> NDArray[np.int64]:
        """All live ids of photos in `folder` (relative to the root, ending in a slash), ascending."""
        return self._live(pc.starts_with(self.images.path_column, pattern=folder))

    def ids_named(self, names: pa.ChunkedArray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All live ids of the photos that names (n,) in a list stand for, ascending; and what each name stands for.

        The latter (n,) is `NO_PHOTO`, `SEVERAL` or another number. Removed photos have names, too: a name never
        stands for another photo because its own is removed.
        """
        photos = Manifest.of(self.images.root, pa.chunked_array([self.images.path_column.unique()]))
        found = find_photos(names, photos)
        return self.ids_at(photos.path_column.take(pa.array(found[found >= 0]))), found

    def by_preference(self, found: NDArray[np.int64]) -> NDArray[np.int64]:
        """All live ids (int64), so that of several at one path the first is the one that stands for it.

        That is the last of those that a search finds (`found`, ascending), or of the others if it finds none.
        """
        live = np.setdiff1d(np.arange(len(self.images)), self.removed, assume_unique=True)
        return np.concatenate([found[::-1], np.setdiff1d(live, found, assume_unique=True)[::-1]])

    def _live(self, is_meant: pa.ChunkedArray) -> NDArray[np.int64]:
        return np.setdiff1d(np.flatnonzero(is_meant.to_numpy()), self.removed, assume_unique=True)
