"""recall@N: the share of queries that have a positive among their first N answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

REPORTED_N = (1, 5, 10, 15, 20, 50, 100, 250, 500, 1000)


def recall_at(
    ranked: Sequence[NDArray[np.int64]],
    positives: Sequence[NDArray[np.int64]],
    ns: Sequence[int],
    *,
    only_with_positives: bool = False,
) -> dict[int, float]:
    """recall@N in percent for each N of `ns`.

    `ranked[q]` are database ids, best first; `positives[q]` are the positives of query q. A query without a
    positive is a miss (the field's convention), or left out with `only_with_positives`. NaN without queries.
    """
    found = first_hits(ranked, positives)
    if only_with_positives:
        found = found[[len(matches) > 0 for matches in positives]]
    return recall_of(found, ns)


def recall_of(hits: NDArray[np.float64], ns: Sequence[int]) -> dict[int, float]:
    """recall@N in percent, from the positions `hits` (Q,) of first hits (see `first_hits`)."""
    if not len(hits):
        return dict.fromkeys(ns, float("nan"))
    return {n: 100.0 * float((hits < n).mean()) for n in ns}


def first_hits(ranked: Sequence[NDArray[np.int64]], positives: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]:
    """(Q,) the position, from 0, of each query's first answer that is a positive; infinite if there is none."""
    return np.array(
        [_first_hit(answers, matches) for answers, matches in zip(ranked, positives, strict=True)], np.float64
    )


def _first_hit(answers: NDArray[np.int64], matches: NDArray[np.int64]) -> float:
    hits = np.flatnonzero(np.isin(answers, matches))
    return float(hits[0]) if len(hits) else float("inf")
