"""Who counts as the same place, against every distance written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pairvpr.data.positives import within_radius
from tests.support.shared import SHARED, needs_shared

pytestmark = pytest.mark.slow

# Quarters of a metre at the size of real UTM coordinates: squares and sums of them are exact in float64.
GRID_POINTS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=25)
ORIGIN_M = np.array([447_000.0, 5_411_000.0])


def brute_force(queries: NDArray[np.float64], database: NDArray[np.float64], radius_m: float) -> list[list[int]]:
    found = []
    for first in range(0, len(queries), 500):
        differences = queries[first : first + 500, None] - database[None]
        near = (differences**2).sum(axis=2) <= radius_m**2
        found += [np.flatnonzero(row).tolist() for row in near]
    return found


def as_utm_m(points: list[tuple[int, int]]) -> NDArray[np.float64]:
    return ORIGIN_M + np.array(points, dtype=np.float64).reshape(-1, 2) / 4


@given(GRID_POINTS, GRID_POINTS, st.integers(1, 60))
def test_equals_brute_force_with_the_radius_included(
    queries: list[tuple[int, int]], database: list[tuple[int, int]], quarters: int
) -> None:
    found = within_radius(as_utm_m(queries), as_utm_m(database), quarters / 4)
    assert [ids.tolist() for ids in found] == brute_force(as_utm_m(queries), as_utm_m(database), quarters / 4)
    assert all(ids.dtype == np.int64 for ids in found)


def test_exactly_the_radius_counts_and_a_millimetre_more_does_not() -> None:
    queries = ORIGIN_M[None]
    database = ORIGIN_M + np.array([[15.0, 20.0], [15.0, 20.001], [0.0, -25.0], [25.001, 0.0], [0.0, 0.0]])
    assert [ids.tolist() for ids in within_radius(queries, database, 25.0)] == [[0, 2, 4]]


def test_many_positives_of_many_queries_equal_brute_force_on_a_sample() -> None:
    """A street in which each of 2,000 queries has hundreds of positives, some of them at the very same place."""
    rng = np.random.default_rng(0)
    database = ORIGIN_M + rng.uniform([0, 0], [2000, 8], (3_000, 2)).repeat(7, axis=0)
    queries = ORIGIN_M + rng.uniform([0, 0], [2000, 8], (2_000, 2))
    found = within_radius(queries, database, 25.0)
    sample = rng.choice(len(queries), 40, replace=False)
    assert [found[i].tolist() for i in sample] == brute_force(queries[sample], database, 25.0)
    assert np.mean([len(ids) for ids in found]) > 400
    assert all(ids.dtype == np.int64 and len(np.unique(ids)) == len(ids) for ids in found)


@needs_shared
@pytest.mark.parametrize(
    ("name", "num_queries", "num_database"), [("pitts30k_test", 6816, 10000), ("tokyo247", 315, 75984)]
)
def test_public_benchmarks(name: str, num_queries: int, num_database: int) -> None:
    with np.load(SHARED / "data" / f"{name}_positions.npz") as arrays:
        queries, database = (arrays[key].astype(np.float64) for key in ("utmQ", "utmDb"))
        radius_m = float(arrays["posDistThr"])
    assert (len(queries), len(database), radius_m) == (num_queries, num_database, 25.0)
    found = within_radius(queries, database, radius_m)
    assert [ids.tolist() for ids in found] == brute_force(queries, database, radius_m)
    if name == "pitts30k_test":
        assert min(len(ids) for ids in found) > 0
