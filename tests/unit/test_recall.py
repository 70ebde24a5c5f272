"""recall@N against cases counted by hand and a slow count."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pairvpr.evaluation.recall import recall_at

IDS = st.integers(0, 9)
QUERIES = st.lists(
    st.tuples(st.lists(IDS, max_size=6, unique=True), st.lists(IDS, max_size=3, unique=True)), max_size=8
)


def arrays(*rows: list[int]) -> list[NDArray[np.int64]]:
    return [np.array(row, dtype=np.int64) for row in rows]


def test_counted_by_hand() -> None:
    ranked = arrays([5, 1, 2], [0, 9, 7], [3, 4, 8], [])
    positives = arrays([1], [0, 7], [6], [2])
    assert recall_at(ranked, positives, [1, 2, 3, 100]) == {1: 25.0, 2: 50.0, 3: 50.0, 100: 50.0}


def test_a_query_without_positives_is_a_miss_or_left_out() -> None:
    ranked, positives = arrays([1], [1], [2], [3]), arrays([1], [], [], [4])
    assert recall_at(ranked, positives, [1]) == {1: 25.0}
    assert recall_at(ranked, positives, [1], only_with_positives=True) == {1: 50.0}


def test_several_positives_count_once() -> None:
    assert recall_at(arrays([1, 2, 3]), arrays([1, 2, 3]), [1, 3]) == {1: 100.0, 3: 100.0}


def test_without_queries_there_is_no_number() -> None:
    assert math.isnan(recall_at([], [], [1])[1])
    assert math.isnan(recall_at(arrays([1]), arrays([]), [1], only_with_positives=True)[1])
    assert recall_at(arrays([1]), arrays([1]), []) == {}


def test_answers_and_positives_belong_together() -> None:
    with pytest.raises(ValueError):
        recall_at(arrays([1], [2]), arrays([1]), [1])


@given(QUERIES, st.lists(st.integers(1, 8), max_size=5, unique=True), st.booleans())
def test_equals_a_slow_count(
    queries: list[tuple[list[int], list[int]]], ns: list[int], only_with_positives: bool
) -> None:
    counted = [query for query in queries if query[1] or not only_with_positives]
    found = recall_at(
        arrays(*(answers for answers, _ in queries)),
        arrays(*(matches for _, matches in queries)),
        ns,
        only_with_positives=only_with_positives,
    )
    assert list(found) == ns
    for n in ns:
        hits = sum(any(answer in matches for answer in answers[:n]) for answers, matches in counted)
        if counted:
            assert found[n] == pytest.approx(100 * hits / len(counted), abs=1e-9)
        else:
            assert math.isnan(found[n])
