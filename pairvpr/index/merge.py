"""The k best of several lists of best.

Q queries, k results.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Found = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Squared distances and ids, (Q, k) each, best first; equal distances are ordered by id."""


def merge_top_k(parts: Sequence[Found], k: int) -> Found:
    """The k nearest of all parts, which cover different ids: (Q, k), or fewer columns if there are fewer ids."""
    distances = np.concatenate([part[0] for part in parts], axis=1)
    ids = np.concatenate([part[1] for part in parts], axis=1)
    order = np.lexsort((ids, distances), axis=1)[:, :k]
    return np.take_along_axis(distances, order, 1), np.take_along_axis(ids, order, 1)
