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
WORKING_BITS = 128
"""Least precision of a binomial coefficient in `sign_test`: a billion roundings stay far below a double's last bit."""


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
    """Exact two-sided p-value that changes for better and for worse are equally likely (McNemar's exact test).

    Its relative error is that of one rounding to double precision. The time grows with the smaller of the two numbers.
    """
    num_changed, fewer = int(num_better) + int(num_worse), min(int(num_better), int(num_worse))
    term = tail = 1 << WORKING_BITS  # binomial coefficients and their sum, in units of 2**-scale
    scale = WORKING_BITS
    for count in range(1, fewer + 1):
        term = term * (num_changed - count + 1) // count
        tail += term
        excess = max(0, term.bit_length() - 2 * WORKING_BITS)
        term, tail, scale = term >> excess, tail >> excess, scale - excess
    return min(1.0, math.ldexp(tail, 1 - num_changed - scale))
