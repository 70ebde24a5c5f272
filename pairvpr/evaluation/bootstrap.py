"""Uncertainty of a mean over queries due to the sample of queries: bootstrap intervals and the sign test.

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
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0

    def percent(self) -> str:
        """All three in percent."""
        return f"{100 * self.mean:.1f} ({100 * self.low:.1f} to {100 * self.high:.1f})"


def bootstrap_interval(values: NDArray[np.float64]) -> Interval:
    """The mean of `values` (Q,), Q > 0, and its bootstrap percentile interval, with a fixed seed.

    For a paired difference, pass the difference for each query. Counts of distinct values in a resample are
    multinomial, so the cost depends on the number of distinct values and not on Q.
    """
    distinct, counts = np.unique(values, return_counts=True)
    draws = np.random.default_rng(SEED).multinomial(len(values), counts / len(values), size=NUM_RESAMPLES)
    low, high = np.percentile(draws @ distinct / len(values), [2.5, 97.5])
    return Interval(float(np.mean(values)), float(low), float(high))


def sign_test(num_better: int, num_worse: int) -> float:
    """Exact two-sided p-value that changes for better and for worse are equally likely (McNemar's exact test)."""
    num_changed, fewer = num_better + num_worse, min(num_better, num_worse)
    tail = sum(math.comb(num_changed, count) for count in range(fewer + 1))
    return min(1.0, 2 * tail / 2**num_changed)
