"""Positives by distance: which photos show the same place."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

_QUERIES_AT_A_TIME = 512  # the tree returns Python numbers, which take five times the memory of arrays


def within_radius(
    queries_utm_m: NDArray[np.float64], database_utm_m: NDArray[np.float64], radius_m: float
) -> list[NDArray[np.int64]]:
    """For each query, the ids of database photos at most `radius_m` away, ascending.

    Both arrays are (n, 2), east and north in metres of one UTM zone. A photo exactly `radius_m` away counts.
    """
    tree = KDTree(database_utm_m)
    positives: list[NDArray[np.int64]] = []
    for first in range(0, len(queries_utm_m), _QUERIES_AT_A_TIME):
        found = tree.query_ball_point(queries_utm_m[first : first + _QUERIES_AT_A_TIME], radius_m, return_sorted=True)
        positives += [np.asarray(ids, dtype=np.int64) for ids in found]
    return positives
