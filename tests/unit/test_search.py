"""Sharded search equals brute force, id for id, however the rows are cut and however many tie."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pairvpr.index.merge import Found, merge_top_k
from pairvpr.index.search import QUERIES_PER_CALL, Shard, flat_index, search

Rows = NDArray[np.float32]


def brute_force(rows: Rows, ids: NDArray[np.int64], queries: Rows, k: int) -> Found:
    """All distances in float64, ordered by (distance, id)."""
    distances = ((queries[:, None].astype(np.float64) - rows[None]) ** 2).sum(axis=2)
    order = np.array([sorted(range(len(ids)), key=lambda row: (line[row], ids[row]))[:k] for line in distances])
    order = order.reshape(len(queries), -1).astype(np.int64)
    return np.take_along_axis(distances, order, 1).astype(np.float32), ids[order]


def sharded(
    rows: Rows, ids: NDArray[np.int64], queries: Rows, k: int, cuts: Sequence[int], merge_one_by_one: bool = False
) -> Found:
    bounds = [0, *cuts, len(rows)]
    parts = [
        search(Shard(flat_index(rows[first:stop]), ids[first:stop]), queries, k, num_threads=1)
        for first, stop in itertools.pairwise(bounds)
    ]
    if not merge_one_by_one:
        return merge_top_k(parts, k)
    found = parts[0]
    for part in parts[1:]:
        found = merge_top_k([part, found], k)
    return found


def assert_same(found: Found, expected: Found) -> None:
    assert (found[0].dtype, found[1].dtype) == (np.float32, np.int64)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])


@st.composite
def databases(draw: st.DrawFn) -> tuple[Rows, NDArray[np.int64], list[int]]:
    """Rows of small integers, of which many are equal; ids with gaps; cuts into 1 to 5 shards, some empty."""
    width, num_rows = draw(st.integers(1, 4)), draw(st.integers(0, 40))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = generator.integers(0, draw(st.integers(1, 3)), (num_rows, width), endpoint=True).astype(np.float32)
    ids = np.cumsum(generator.integers(1, 4, num_rows)).astype(np.int64)
    cuts = sorted(draw(st.lists(st.integers(0, num_rows), max_size=4)))
    return rows, ids, cuts


@settings(max_examples=200)
@given(databases(), st.integers(1, 45), st.integers(0, 30), st.integers(0, 2**32 - 1), st.booleans())
def test_shards_and_merge_equal_brute_force(
    database: tuple[Rows, NDArray[np.int64], list[int]], k: int, num_queries: int, seed: int, one_by_one: bool
) -> None:
    rows, ids, cuts = database
    queries = np.random.default_rng(seed).integers(0, 3, (num_queries, rows.shape[1])).astype(np.float32)
    found = sharded(rows, ids, queries, k, cuts, one_by_one)
    if num_queries == 0:
        assert len(found[0]) == len(found[1]) == 0
        return
    assert found[1].shape == (num_queries, min(k, len(rows)))
    assert_same(found, brute_force(rows, ids, queries, k))


# faiss keeps the best in a heap below k = 100 and in a reservoir from there on; each chooses other rows of a tie.
@pytest.mark.parametrize("k", [1, 7, 99, 100, 101, 250, 600])
@pytest.mark.parametrize("cuts", [[], [400], [1, 2, 900], [0, 300, 300, 1200]])
def test_hundreds_of_exact_ties_at_the_boundary(k: int, cuts: list[int]) -> None:
    generator = np.random.default_rng(k)
    rows = generator.integers(0, 1, (1200, 8), endpoint=True).astype(np.float32)
    rows[generator.permutation(1200)[:700]] = 1
    ids = np.cumsum(generator.integers(1, 5, 1200)).astype(np.int64)
    queries = np.concatenate([np.ones((3, 8)), generator.integers(0, 2, (27, 8))]).astype(np.float32)
    distances = ((queries[0] - rows) ** 2).sum(axis=1)
    assert (distances == 0).sum() >= 700
    assert_same(sharded(rows, ids, queries, k, cuts), brute_force(rows, ids, queries, k))


class ContraryIndex:
    """An exact index that, as faiss may, keeps whichever rows it likes of those that tie: here the last ones."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.ntotal = len(rows)

    def search(self, queries: Rows, k: int, params: None = None) -> Found:
        assert params is None
        distances = ((queries[:, None] - self.rows[None]) ** 2).sum(axis=2)
        order = np.array([sorted(range(self.ntotal), key=lambda row: (line[row], -row))[:k] for line in distances])
        return np.take_along_axis(distances, order, 1), order


@pytest.mark.parametrize("k", [1, 5, 39, 40, 41, 60])
@pytest.mark.parametrize("num_values", [1, 2, 9])
def test_ties_go_to_the_lowest_id_whatever_the_index_keeps(k: int, num_values: int) -> None:
    generator = np.random.default_rng(num_values)
    rows = generator.integers(0, num_values, (40, 2)).astype(np.float32)
    queries = generator.integers(0, 9, (10, 2)).astype(np.float32)
    ids = np.arange(40) * 7
    found = search(Shard(ContraryIndex(rows), ids), queries, k, num_threads=1)
    assert_same(found, brute_force(rows, ids, queries, k))


def test_all_rows_equal() -> None:
    rows, ids = np.ones((500, 16), np.float32), np.arange(500) * 3
    distances, found = sharded(rows, ids, np.zeros((2, 16), np.float32), 120, [10, 11, 300])
    assert found.tolist() == [list(range(0, 360, 3))] * 2
    assert (distances == 16).all()


def unit_rows(generator: np.random.Generator, num_rows: int, width: int) -> Rows:
    rows = generator.standard_normal((num_rows, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# 512 is the width of the published networks, and 256 queries fill one call of faiss.
@pytest.mark.slow
@pytest.mark.parametrize("width", [16, 128, 512])
@pytest.mark.parametrize("num_queries", [1, 40, QUERIES_PER_CALL, QUERIES_PER_CALL + 30])
@pytest.mark.parametrize("cuts", [[1], [700], [1, 8, 500, 501]])
def test_shards_equal_one_index_bit_for_bit(width: int, num_queries: int, cuts: list[int]) -> None:
    generator = np.random.default_rng(width)
    rows, queries = unit_rows(generator, 1500, width), unit_rows(generator, num_queries, width)
    ids = np.arange(1500)
    for k in (1, 10, 100, len(rows)):  # all of them: every single distance is compared
        whole = search(Shard(flat_index(rows), ids), queries, k, num_threads=1)
        assert_same(sharded(rows, ids, queries, k, cuts), whole)


def test_copies_of_a_photo_tie_exactly_wherever_they_lie() -> None:
    """Equal descriptors have equal distances, whatever their places in their shards."""
    generator = np.random.default_rng(1)
    rows, queries = unit_rows(generator, 1500, 512), unit_rows(generator, QUERIES_PER_CALL, 512)
    copies = np.array([0, 3, 700, 1023, 1024, 1499])
    rows[copies] = rows[700]
    distances, ids = search(Shard(flat_index(rows), np.arange(1500)), queries, 1500, num_threads=2)
    for line, found in zip(distances, ids, strict=True):
        places = np.flatnonzero(np.isin(found, copies))
        assert len(set(line[places])) == 1
        assert found[places].tolist() == copies.tolist()


def test_more_queries_than_one_call_are_answered_in_order() -> None:
    rows = np.arange(600, dtype=np.float32)[:, None]
    queries = rows[::-1].copy()
    _, ids = search(Shard(flat_index(rows), np.arange(600)), queries, 1, num_threads=2)
    assert ids[:, 0].tolist() == list(range(599, -1, -1))


def test_merge_orders_equal_distances_by_id() -> None:
    parts = [
        (np.array([[0.5, 0.5]], np.float32), np.array([[4, 9]])),
        (np.array([[0.25, 0.5]], np.float32), np.array([[7, 1]])),
        (np.empty((1, 0), np.float32), np.empty((1, 0), np.int64)),
    ]
    distances, ids = merge_top_k(parts, 3)
    assert ids.tolist() == [[7, 1, 4]]
    assert distances.tolist() == [[0.25, 0.5, 0.5]]
    assert merge_top_k(parts, 9)[1].tolist() == [[7, 1, 4, 9]]


@settings(max_examples=200)
@given(
    st.integers(0, 5),
    st.lists(st.integers(0, 9), min_size=1, max_size=4),
    st.integers(0, 12),
    st.integers(0, 2**32 - 1),
)
def test_merging_equals_sorting_pairs(num_queries: int, widths: list[int], k: int, seed: int) -> None:
    """By (distance, id): ties, places that are empty, approximate distances below zero, and ids of any size."""
    generator = np.random.default_rng(seed)
    parts: list[Found] = []
    first = int(generator.choice([0, 2**32 - 20, 2**40]))
    for width in widths:
        distances = generator.integers(-2, 3, (num_queries, width)).astype(np.float32)
        distances[generator.random((num_queries, width)) < 0.3] *= np.float32(0.1)
        distances[(distances == 0) & (generator.random((num_queries, width)) < 0.5)] = np.float32(-0.0)
        ids = np.tile(np.arange(first, first + width), (num_queries, 1))
        is_empty = generator.random((num_queries, width)) < 0.1
        distances[is_empty], ids[is_empty] = np.inf, -1
        parts.append((distances, ids))
        first += width
    found = merge_top_k(parts, k)
    for query in range(num_queries):
        pairs = sorted(
            (float(d), int(i)) for part in parts for d, i in zip(part[0][query], part[1][query], strict=True)
        )
        assert list(zip(found[0][query].tolist(), found[1][query].tolist(), strict=True)) == pairs[:k]
