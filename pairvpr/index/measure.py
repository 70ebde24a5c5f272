"""The recall of an approximate index against exact search, and the effort that a target recall needs.

Q held-out rows used as queries, k nearest, S codes on a short list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from pairvpr.index.merge import Found, merge_top_k
from pairvpr.index.search import Effort
from pairvpr.index.threads import faiss_threads

K = 100
RESCORED_STEPS = (200, 400, 800, 1600)
ROWS_AT_ONCE = 1 << 16
COST_OF_RESCORING = 25.0
"""Cost of reading a full-width row, in visits of a code."""
NUM_STANDARD_ERRORS = 2.0
NUM_DIGITS = 4
"""That a manifest keeps of a recall."""
ROUNDED_BY = 0.5 * 10.0**-NUM_DIGITS
SHARE_OF_MISSES = 0.75
"""Real queries are a little harder to find than rows of the index, so fewer rows may be missed."""


@dataclass(frozen=True)
class Step:
    """An effort and its measured recall: mean over Q, and its standard error."""

    effort: Effort
    recall: float
    standard_error: float

    def reaches(self, target: float) -> bool:
        """Whether the recall is very likely at least `target`, also for queries outside the index."""
        return self.recall - NUM_STANDARD_ERRORS * self.standard_error >= 1 - SHARE_OF_MISSES * (1 - target)


def exact_nearest(
    rows: NDArray[np.float32],
    ids: NDArray[np.int64],
    is_live: NDArray[np.bool_],
    queries: NDArray[np.float32],
    k: int,
    num_threads: int,
) -> Found:
    """The k nearest live rows among mapped rows (n, G), read piece by piece."""
    best: Found = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for first in range(0, len(rows), ROWS_AT_ONCE):
        kept = first + np.flatnonzero(is_live[first : first + ROWS_AT_ONCE])
        if len(kept):
            some = np.ascontiguousarray(rows[kept])
            with faiss_threads(num_threads):
                distances, found = faiss.knn(queries, some, min(k, len(kept)))
            best = merge_top_k([best, (distances, ids[kept[found]])], k)
    return best


def without_self(found: Found, own_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ids (Q, k) without each query's own row, or without the last one where it is not found."""
    ids = found[1]
    is_own = ids == own_ids[:, None]
    is_own[~is_own.any(axis=1), -1] = True
    return ids[~is_own].reshape(len(ids), -1)


def probe_steps(num_lists: int) -> list[int]:
    """Numbers of lists to try: powers of two, then all."""
    first = max(1, num_lists // 512)
    steps = [first << i for i in range(20) if first << i < num_lists]
    return [*steps, num_lists]


def recall(found: NDArray[np.int64], exact: NDArray[np.int64]) -> tuple[float, float]:
    """Mean share of the exact ids (Q, k) that are found (Q, k), and its standard error."""
    shares = [len(np.intersect1d(line, truth)) / len(truth) for line, truth in zip(found, exact, strict=True)]
    return float(np.mean(shares)), float(np.std(shares) / np.sqrt(len(shares)))


def cheapest(steps: Sequence[Step], target: float, num_rows: int, num_lists: int) -> Step:
    """The cheapest step that reaches the target, or the one with the highest recall if none does."""
    enough = [step for step in steps if step.reaches(target)]
    if not enough:
        return max(steps, key=lambda step: (step.recall, -step.effort.num_probes))
    return min(enough, key=lambda step: (_cost(step.effort, num_rows, num_lists), -step.recall))


def _cost(effort: Effort, num_rows: int, num_lists: int) -> float:
    return num_rows * effort.num_probes / num_lists + COST_OF_RESCORING * effort.num_rescored


def reached(measured: Mapping[str, Any], target: float) -> bool:
    """`Step.reaches`, of what `as_measured` kept; what it was rounded by is not held against it."""
    step = Step(Effort(), measured["recall"] + ROUNDED_BY, max(0.0, measured["standard_error"] - ROUNDED_BY))
    return step.reaches(target)


def as_measured(chosen: Step, steps: Sequence[Step], target: float, num_queries: int, k: int) -> dict[str, object]:
    """What the manifest says of it."""
    return {
        "what": f"recall of the exact {k} nearest, over {num_queries} held-out rows of the index",
        "target_recall": target,
        "recall": round(chosen.recall, NUM_DIGITS),
        "standard_error": round(chosen.standard_error, NUM_DIGITS),
        "curve": [asdict(step.effort) | {"recall": round(step.recall, NUM_DIGITS)} for step in steps],
    }
