"""Merging top-k lists into one.

Q queries, k results.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Found = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Squared distances and ids, (Q, k) each, best first; equal distances are ordered by id."""

MOST_IDS = 2**32 - 1


def merge_top_k(parts: Sequence[Found], k: int) -> Found:
    """The k nearest of all parts, which cover different ids: (Q, k), or fewer columns if there are fewer ids.

    Ids are -1 (nothing, at an infinite distance) or more.
    """
    distances = np.concatenate([part[0] for part in parts], axis=1)
    ids = np.concatenate([part[1] for part in parts], axis=1)
    if ids.max(initial=0) >= MOST_IDS:
        order = np.lexsort((ids, distances), axis=1)[:, :k]
        return np.take_along_axis(distances, order, 1), np.take_along_axis(ids, order, 1)
    keys = _keys(distances, ids)
    if keys.shape[1] > k > 0:
        keys = np.partition(keys, k - 1, axis=1)[:, :k]
    keys.sort(axis=1)
    return _distances(keys[:, :k]), (keys[:, :k] & np.uint64(MOST_IDS)).astype(np.int64) - 1


def _keys(distances: NDArray[np.float32], ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Integers that sort like (distance, id), many times faster than pairs.

    The bits of a positive float32 grow with its value; those of a negative one shrink, so they are inverted.
    """
    bits = (distances + np.float32(0)).view(np.uint32)  # -0 becomes 0
    bits = bits ^ np.where(bits >> np.uint32(31), np.uint32(0xFFFFFFFF), np.uint32(0x80000000))
    return (bits.astype(np.uint64) << np.uint64(32)) | (ids + 1).astype(np.uint64)


def _distances(keys: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Those that `_keys` was given."""
    bits = (keys >> np.uint64(32)).astype(np.uint32)
    bits = bits ^ np.where(bits >> np.uint32(31), np.uint32(0x80000000), np.uint32(0xFFFFFFFF))
    return bits.view(np.float32)
