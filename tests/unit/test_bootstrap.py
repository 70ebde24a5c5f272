"""Bootstrap intervals against the exact distribution and against resampling one by one."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pairvpr.evaluation.bootstrap import bootstrap_interval, sign_test


def hits(num_right: int, num_queries: int) -> np.ndarray:
    return np.repeat([1.0, 0.0], [num_right, num_queries - num_right])


@pytest.mark.parametrize(("num_right", "num_queries"), [(140, 200), (3, 60), (59, 60), (700, 740)])
def test_of_hits_is_the_binomial_interval(num_right: int, num_queries: int) -> None:
    """Resampled hits are binomial: the exact percentiles are known, and 10,000 draws meet them to a query or so."""
    found = bootstrap_interval(hits(num_right, num_queries))
    low, high = stats.binom.ppf([0.025, 0.975], num_queries, num_right / num_queries) / num_queries
    assert found.mean == pytest.approx(num_right / num_queries)
    assert abs(found.low - low) <= 1.01 / num_queries
    assert abs(found.high - high) <= 1.01 / num_queries


def test_equals_drawing_queries_one_by_one() -> None:
    values = np.random.default_rng(5).choice([-1.0, 0.0, 1.0, 0.25], size=120, p=[0.1, 0.6, 0.2, 0.1])
    rng = np.random.default_rng(99)
    means = [values[rng.integers(120, size=120)].mean() for _ in range(20_000)]
    found = bootstrap_interval(values)
    assert [found.low, found.high] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.01)
    assert found.mean == pytest.approx(values.mean())


def test_is_the_same_each_time_and_in_any_order() -> None:
    values = hits(30, 50)
    assert bootstrap_interval(values) == bootstrap_interval(values) == bootstrap_interval(values[::-1])


@pytest.mark.parametrize(
    ("plus", "minus", "same", "beyond_chance"),
    [(0, 0, 50, False), (1, 0, 50, False), (3, 3, 50, False), (20, 2, 50, True), (2, 20, 50, True)],
)
def test_a_difference_is_beyond_chance_or_not(plus: int, minus: int, same: int, beyond_chance: bool) -> None:
    """One corrected query of 51 is drawn not at all in (50/51)^51 = 36 % of the resamples."""
    values = np.repeat([1.0, -1.0, 0.0], [plus, minus, same])
    assert bootstrap_interval(values).excludes_zero == beyond_chance


def test_without_spread_there_is_no_width() -> None:
    found = bootstrap_interval(np.ones(7))
    assert (found.mean, found.low, found.high) == (1, 1, 1)
    assert found.percent() == "100.0 (100.0 to 100.0)"


def test_many_queries_take_no_memory_of_their_number() -> None:
    """A table of all draws of 3 million queries would be 240 GB."""
    found = bootstrap_interval(hits(2_000_000, 3_000_000))
    assert found.low == pytest.approx(2 / 3 - 1.96 * np.sqrt(2 / 9 / 3e6), abs=3e-5)


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (4, 0), (1, 1), (7, 1), (2, 9), (30, 12), (900, 1100)])
def test_sign_test_is_the_binomial_test(better: int, worse: int) -> None:
    changed = better + worse
    expected = stats.binomtest(better, changed).pvalue if changed else 1.0
    assert sign_test(better, worse) == pytest.approx(expected, rel=1e-9)


def exact(better: int, worse: int) -> Fraction:
    """The p-value by its definition, without rounding."""
    changed = better + worse
    tail = sum(math.comb(changed, count) for count in range(min(better, worse) + 1))
    return min(Fraction(1), Fraction(2 * tail, 2**changed))


def test_sign_test_of_all_small_numbers() -> None:
    for better in range(61):
        for worse in range(61):
            assert sign_test(better, worse) == float(exact(better, worse)), (better, worse)


def test_sign_test_at_random_and_at_extremes() -> None:
    draw = random.Random(7)
    splits = [(draw.randint(0, changed), changed) for changed in (draw.randint(1, 600) for _ in range(3000))]
    near_half = [
        (changed // 2 - draw.randint(0, 40), changed) for changed in (draw.randint(80, 1500) for _ in range(60))
    ]
    extremes = [
        (fewer, changed) for changed in (999, 1074, 1075, 1076, 2001, 5000) for fewer in (0, 1, 2, changed // 2)
    ]
    for fewer, changed in splits + near_half + extremes:
        expected = float(exact(fewer, changed - fewer))
        found = sign_test(fewer, changed - fewer)
        assert found == sign_test(changed - fewer, fewer)
        assert found == pytest.approx(expected, rel=2**-52, abs=5e-324), (fewer, changed)


def test_sign_test_of_a_million_changes() -> None:
    """The normal approximation is good to 1e-5 there."""
    half = 500_000
    assert sign_test(half, half) == sign_test(half, half - 1) == 1.0
    for apart in (500, 1_000, 3_000):
        expected = math.erfc((apart - 0.5) / (0.5 * math.sqrt(2 * half)) / math.sqrt(2))
        assert sign_test(half - apart, half + apart) == pytest.approx(expected, rel=1e-3)
    assert sign_test(0, 2 * half) == 0.0
    numbers: Any = np.array([half - 500, half + 500], np.int32)
    assert sign_test(*numbers) == sign_test(half - 500, half + 500)
