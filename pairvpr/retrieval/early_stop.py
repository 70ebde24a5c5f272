"""When to stop scoring a query's candidates: one rule, shared by re-ranker and calibration. Needs only numpy.

A query's candidates are scored in retrieval order, in rounds of `round_size` pairs. After each round, the query is
finished if the margin of its scores so far reaches the threshold. Candidates that were not scored have the pair score
-inf and come last, in retrieval order. K candidates.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def margin(scores: NDArray[np.float32]) -> float:
    """How clear a query's answer is: the best pair score (sum of two logits) so far, from scores (n,), n >= 1."""
    return float(scores.max())


def stopped_after(scores: NDArray[np.float32], round_size: int, threshold: float) -> int:
    """The number of candidates that would be scored, given all pair scores (K,) in retrieval order."""
    for scored in range(round_size, len(scores), round_size):
        if margin(scores[:scored]) >= threshold:
            return scored
    return len(scores)
