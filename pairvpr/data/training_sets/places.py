"""Shared by training sets: grouping rows into places, and drawing photos of a place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.random import Generator
from numpy.typing import NDArray

from pairvpr.data.training_sets.base import View

NUM_HASHED_AT_ONCE = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Rows of a table in place order: place i is rows[offsets[i]] to rows[offsets[i + 1] - 1]."""

    rows: NDArray[np.int64]
    offsets: NDArray[np.int64]


def group(keys: NDArray[np.int64], min_rows: int) -> Places:
    """A place for each key (n,) with at least `min_rows` rows; places in key order, rows in their own order."""
    rows = np.argsort(keys, kind="stable")
    _, counts = np.unique(keys, return_counts=True)
    is_place = counts >= min_rows
    return Places(rows[np.repeat(is_place, counts)], offsets_of(counts[is_place]))


def offsets_of(counts: NDArray[np.integer]) -> NDArray[np.int64]:
    """Start of each of n groups of these sizes, and the end of the last one (n + 1,)."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def digest(*columns: NDArray[Any] | pa.Array | pa.ChunkedArray) -> str:
    """sha256 of columns, in order: of numbers their bytes, of texts their lines."""
    found = hashlib.sha256()
    for column in columns:
        found.update(f"{len(column)}\n".encode())
        if isinstance(column, np.ndarray):
            found.update(np.ascontiguousarray(column).tobytes())
            continue
        for first in range(0, len(column), NUM_HASHED_AT_ONCE):
            found.update("\n".join([*column.slice(first, NUM_HASHED_AT_ONCE).to_pylist(), ""]).encode())
    return found.hexdigest()


def draw_photos(
    num_photos: int, url_of: Callable[[int], str], count: int, rng: Generator, broken: Collection[str]
) -> list[View]:
    """`count` different photos of a place, drawn uniformly, without those in `broken`; fewer if it has no more.

    `url_of` gives the URL of photos 0 to `num_photos` - 1.
    """
    views: list[View] = []
    for photo in rng.permutation(num_photos):
        if len(views) == count:
            break
        view = View(url_of(int(photo)))
        if view.url not in broken and view not in views:
            views.append(view)
    return views
