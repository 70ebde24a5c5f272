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

    `ranked[q]` are database ids, best first; `positives[q]` those at the place of query q. A query without a
    positive is a miss (the field's convention), or left out with `only_with_positives`. NaN without queries.
    """
    first_hits = np.array(
        [
            _first_hit(answers, matches)
            for answers, matches in zip(ranked, positives, strict=True)
            if len(matches) or not only_with_positives
        ]
    )
    if not len(first_hits):
        return dict.fromkeys(ns, float("nan"))
    return {n: 100.0 * float((first_hits < n).mean()) for n in ns}


def _first_hit(answers: NDArray[np.int64], matches: NDArray[np.int64]) -> float:
    """Position of the first answer that is a match; infinite if there is none."""
    hits = np.flatnonzero(np.isin(answers, matches))
    return float(hits[0]) if len(hits) else float("inf")
