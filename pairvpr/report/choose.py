"""What of a large run is shown: which queries are pictured, which points are on the map. The same run, the same choice.

Q queries, N points.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pairvpr.report.outcomes import KINDS, Outcomes

MOST_ON_MAP = 20_000
"""Points of the database, and as many queries."""


def pictured(outcomes: Outcomes, number: int) -> NDArray[np.int64]:
    """Ids of at most `number` queries, ascending, those that failed first of all.

    Queries are grouped by what became of them. Each group gets an equal share, what a small one does not need goes to
    the others, and within a group the queries are spread evenly over the list.
    """
    if len(outcomes) <= number:
        return np.arange(len(outcomes))
    group = outcomes.kind.astype(np.int64)
    for place, special in enumerate((outcomes.corrected, outcomes.broken, outcomes.refused)):
        group[special] = len(KINDS) + place
    names, sizes = np.unique(group, return_counts=True)
    order = np.argsort(sizes, kind="stable")
    chosen, left = [], number
    for place, which in enumerate(order):
        share = min(int(sizes[which]), left // (len(order) - place))
        chosen.append(spread(np.flatnonzero(group == names[which]), share))
        left -= share
    return np.sort(np.concatenate(chosen))


def spread(values: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    """`number` of the values (n,), evenly over their places."""
    if number >= len(values):
        return values
    return values[(np.arange(number) * len(values)) // max(1, number)]


def thinned(utm_m: NDArray[np.float64], most: int = MOST_ON_MAP) -> tuple[NDArray[np.int64], float]:
    """Ids of at most `most` of the points (N, 2), and the side in metres of the cells that kept one each; 0 = all.

    Points without a position are left out. The cells are as small as that allows, but for a factor of 1.25.
    """
    known = np.flatnonzero(np.isfinite(utm_m).all(axis=1))
    if len(known) <= most:
        return known, 0.0
    places = utm_m[known] - utm_m[known].min(axis=0)
    side_m = max(float(np.sqrt(np.prod(np.maximum(places.max(axis=0), 1e-3)) / most)) / 4, 1e-3)
    while True:
        cells = np.floor(places / side_m).astype(np.int64)
        _, first = np.unique(cells[:, 0] * (cells[:, 1].max() + 1) + cells[:, 1], return_index=True)
        if len(first) <= most:
            return known[np.sort(first)], side_m
        side_m *= 1.25
