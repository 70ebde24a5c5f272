"""When to stop scoring a query's candidates: the one rule of the re-ranker and of its calibration. Needs numpy alone.

A query's candidates are scored in retrieval order, a round of `round_size` pairs at a time. After each round the
margin of the scores so far is compared with the threshold; at or above it the query is finished. Candidates that were
not scored keep the order of retrieval behind all that were, with the pair score -inf. K candidates.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def margin(scores: NDArray[np.float32]) -> float:
    """How clear a query's answer is: the best pair score (sum of two logits) of those scored so far (n,), n >= 1."""
    return float(scores.max())


def stopped_after(scores: NDArray[np.float32], round_size: int, threshold: float) -> int:
    """Number of candidates that are scored of those whose pair scores (K,) are given in retrieval order."""
    for scored in range(round_size, len(scores), round_size):
        if margin(scores[:scored]) >= threshold:
            return scored
    return len(scores)
