"""How far a mean over the queries could be off by the choice of queries: bootstrap intervals and the sign test.

Q queries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 10_000
SEED = 0


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval, in the unit of the values."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the mean's sign is beyond chance."""
        return self.low > 0 or self.high < 0

    def percent(self) -> str:
        """All three times 100."""
        return f"{100 * self.mean:.1f} ({100 * self.low:.1f} to {100 * self.high:.1f})"


def bootstrap_interval(values: NDArray[np.float64]) -> Interval:
    """The mean of `values` (Q,), Q > 0, and its percentile interval over resampled queries; the seed is fixed.

    For a paired difference give the difference of each query. How often a resample draws each distinct value is
    multinomial, so resampling costs as much as there are distinct values, however many queries there are.
    """
    distinct, counts = np.unique(values, return_counts=True)
    draws = np.random.default_rng(SEED).multinomial(len(values), counts / len(values), size=NUM_RESAMPLES)
    low, high = np.percentile(draws @ distinct / len(values), [2.5, 97.5])
    return Interval(float(np.mean(values)), float(low), float(high))


def sign_test(num_better: int, num_worse: int) -> float:
    """Exact two-sided p that queries which changed, changed for better and worse alike (McNemar's exact test)."""
    num_changed, fewer = num_better + num_worse, min(num_better, num_worse)
    tail = sum(math.comb(num_changed, count) for count in range(fewer + 1))
    return min(1.0, 2 * tail / 2**num_changed)
