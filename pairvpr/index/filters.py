"""Where and when: which photos a query may find. Q queries, n photos or rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Places:
    """Where all photos of an index were taken, by id: UTM (n, 2), heading (n,) in degrees; NaN = not known."""

    utm_m: NDArray[np.float64]
    heading_deg: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Filters:
    """One row of conditions per query, (Q, 9); NaN = no condition.

    Columns: east and north of a prior position and the radius around it; west, south, east, north of a box, all in
    metres; a heading and how far from it, in degrees. A photo without a known position
    (or heading) meets no condition on it.
    """

    conditions: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        num_queries: int,
        *,
        near: NDArray[np.float64] | None = None,
        radius_m: float | None = None,
        box: NDArray[np.float64] | None = None,
        heading_deg: NDArray[np.float64] | None = None,
        within_deg: float | None = None,
    ) -> Filters:
        """Conditions for all queries, or (with arrays of Q rows) for each: near (2,), box (4,), heading ()."""
        conditions = np.full((num_queries, 9), np.nan)
        if near is not None and radius_m is not None:
            conditions[:, 0:2], conditions[:, 2] = near, radius_m
        if box is not None:
            conditions[:, 3:7] = box
        if heading_deg is not None and within_deg is not None:
            conditions[:, 7], conditions[:, 8] = heading_deg, within_deg
        return cls(conditions)

    def of_queries(self, queries: NDArray[np.int64]) -> Filters:
        """The lines of some of the queries."""
        return Filters(self.conditions[queries])

    def groups(self) -> Iterator[tuple[NDArray[np.float64], NDArray[np.int64]]]:
        """Each distinct row of conditions, and the queries that have it."""
        no_condition = np.nan_to_num(self.conditions, nan=np.inf)  # NaN is not equal to itself
        _, first, which = np.unique(no_condition, axis=0, return_index=True, return_inverse=True)
        for number, row in enumerate(first):
            yield self.conditions[row], np.flatnonzero(which.reshape(-1) == number)


def allowed(line: NDArray[np.float64], places: Places, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(n,) bool: which of the photos `ids` meet one row of conditions."""
    is_allowed = np.ones(len(ids), np.bool_)
    utm_m = places.utm_m[ids]
    if not np.isnan(line[:3]).any():
        is_allowed &= ((utm_m - line[:2]) ** 2).sum(axis=1) <= line[2] ** 2
    if not np.isnan(line[3:7]).any():
        is_allowed &= (utm_m >= line[3:5]).all(axis=1) & (utm_m <= line[5:7]).all(axis=1)
    if not np.isnan(line[7:9]).any():
        apart_deg = np.abs((places.heading_deg[ids] - line[7] + 180) % 360 - 180)
        is_allowed &= apart_deg <= line[8]
    return is_allowed
