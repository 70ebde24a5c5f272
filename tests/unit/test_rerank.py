"""Re-ranking against the plain network in a loop, and how often it describes a photo."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pairvpr.models.pair_vpr import PairVPR
from pairvpr.retrieval.rerank import FeatureCache, Reranker, WorkUnit, work_units
from tests.support.small import shaken_model

NUM_DATABASE, NUM_QUERIES = 12, 5
BYTES_OF_ONE = 4 * 32 * 4
UNIT = {
    0: [3, 1, 7, 0, 11],
    1: [],
    2: [7, 3, 2],
    3: [5, 6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 4],
    4: [1],
}


@pytest.fixture(scope="module")
def model() -> PairVPR:
    """The small network with a classifier that tells pairs apart."""
    return shaken_model()


@pytest.fixture(scope="module")
def features() -> tuple[Tensor, Tensor]:
    """Dense features (n, L, C) of queries and database."""
    generator = torch.Generator().manual_seed(4)
    return torch.randn(NUM_QUERIES, 4, 32, generator=generator), torch.randn(NUM_DATABASE, 4, 32, generator=generator)


class Photos:
    """Dense features by id that count how often each was asked for."""

    def __init__(self, features: tuple[Tensor, Tensor]) -> None:
        self.queries, self.database = features
        self.query_calls: Counter[int] = Counter()
        self.database_calls: Counter[int] = Counter()

    def query(self, query_id: int) -> Tensor:
        self.query_calls[query_id] += 1
        return self.queries[query_id]

    def photo(self, image_id: int) -> Tensor:
        self.database_calls[image_id] += 1
        return self.database[image_id]

    def reranker(self, model: PairVPR, batch_size: int = 3, cache_bytes: int = 0) -> Reranker:
        return Reranker(
            model,
            batch_size=batch_size,
            query_features=self.query,
            database_features=self.photo,
            cache=FeatureCache(cache_bytes),
        )


def naive(
    model: PairVPR, features: tuple[Tensor, Tensor], candidates: Mapping[int, Sequence[int]]
) -> dict[int, list[tuple[float, int]]]:
    """(score, id) of every query, best first, one pair and one direction at a time."""
    queries, database = features
    answers = {}
    with torch.no_grad():
        for query_id, ids in candidates.items():
            query = queries[query_id : query_id + 1]
            scored = []
            for image_id in ids:
                photo = database[image_id : image_id + 1]
                score = model.pair_logits(query, photo) + model.pair_logits(photo, query)
                scored.append((float(score), image_id))
            answers[query_id] = sorted(scored, key=lambda pair: -pair[0])
    return answers


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_scores_and_order_are_those_of_the_plain_network(
    model: PairVPR, features: tuple[Tensor, Tensor], batch_size: int
) -> None:
    answers = Photos(features).reranker(model, batch_size).rerank(WorkUnit(0, UNIT))
    expected = naive(model, features, UNIT)
    assert [answer.query_id for answer in answers] == list(UNIT)
    assert len({round(score, 3) for score, _ in expected[3]}) == NUM_DATABASE  # the order is a real one
    for answer in answers:
        assert answer.ids.tolist() == [image_id for _, image_id in expected[answer.query_id]]
        scores = [score for score, _ in expected[answer.query_id]]
        np.testing.assert_allclose(answer.pair_scores, scores, rtol=0, atol=1e-5)
        assert (answer.ids.dtype, answer.pair_scores.dtype) == (np.int64, np.float32)
        assert len(answer.ids) == len(UNIT[answer.query_id])


def test_equal_scores_keep_the_order_of_retrieval(
    model: PairVPR, features: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network rounds by place in the batch, so scores that tie are given here: 1, 0, -0.0 and 1 again."""
    scores = iter([torch.tensor([0.0, 1.0, -0.0]), torch.tensor([1.0, -2.0, 0.0]), torch.tensor([1.0])])
    monkeypatch.setattr(model, "score_pairs", lambda *_: next(scores))
    (answer,) = Photos(features).reranker(model, 3).rerank(WorkUnit(0, {0: [8, 1, 9, 4, 3, 2, 6]}))
    assert answer.ids.tolist() == [1, 4, 6, 8, 9, 2, 3]
    assert answer.pair_scores.tolist() == [1, 1, 1, 0, 0, 0, -2]


def test_many_equal_scores_keep_the_order_of_retrieval(
    model: PairVPR, features: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enough of them that a sort which is not stable mixes them up."""
    candidates = np.random.default_rng(0).permutation(NUM_DATABASE * 20) % NUM_DATABASE
    monkeypatch.setattr(model, "score_pairs", lambda query, _: torch.arange(len(query)) % 2)
    (answer,) = Photos(features).reranker(model, 1000).rerank(WorkUnit(0, {0: candidates.tolist()}))
    assert answer.ids.tolist() == [*candidates[1::2], *candidates[::2]]


def test_each_photo_is_described_once_in_a_unit(model: PairVPR, features: tuple[Tensor, Tensor]) -> None:
    photos = Photos(features)
    photos.reranker(model).rerank(WorkUnit(0, UNIT))
    assert photos.database_calls == Counter({image_id for ids in UNIT.values() for image_id in ids})
    assert max(photos.query_calls.values()) == 1


def test_a_cache_serves_later_units(model: PairVPR, features: tuple[Tensor, Tensor]) -> None:
    photos = Photos(features)
    reranker = photos.reranker(model, cache_bytes=1 << 20)
    first, second = reranker.rerank(WorkUnit(0, UNIT)), reranker.rerank(WorkUnit(1, UNIT))
    assert max(photos.database_calls.values()) == 1
    assert [answer.pair_scores.tobytes() for answer in first] == [answer.pair_scores.tobytes() for answer in second]


@pytest.mark.parametrize("cache_bytes", [0, BYTES_OF_ONE, 3 * BYTES_OF_ONE + 1, 1 << 30])
@pytest.mark.parametrize("queries_per_unit", [1, 2, 100])
def test_neither_cache_nor_units_change_a_bit(
    model: PairVPR, features: tuple[Tensor, Tensor], cache_bytes: int, queries_per_unit: int
) -> None:
    def run(cache_bytes: int, queries_per_unit: int) -> dict[int, tuple[bytes, bytes]]:
        reranker = Photos(features).reranker(model, cache_bytes=cache_bytes)
        answers = [answer for unit in work_units(UNIT, queries_per_unit) for answer in reranker.rerank(unit)]
        return {answer.query_id: (answer.ids.tobytes(), answer.pair_scores.tobytes()) for answer in answers}

    assert run(cache_bytes, queries_per_unit) == run(0, 1)


def test_no_candidates_no_answers(model: PairVPR, features: tuple[Tensor, Tensor]) -> None:
    reranker = Photos(features).reranker(model)
    assert reranker.rerank(WorkUnit(0, {})) == []
    (answer,) = reranker.rerank(WorkUnit(0, {2: []}))
    assert (answer.query_id, answer.ids.tolist(), answer.pair_scores.tolist()) == (2, [], [])
    assert (answer.ids.dtype, answer.pair_scores.dtype) == (np.int64, np.float32)


@given(st.dictionaries(st.integers(0, 50), st.lists(st.integers(0, 9), max_size=3), max_size=12), st.integers(1, 14))
def test_work_units_cut_queries_in_their_order(candidates: dict[int, list[int]], queries_per_unit: int) -> None:
    units = work_units(candidates, queries_per_unit)
    assert [unit.unit for unit in units] == list(range(len(units)))
    assert [pair for unit in units for pair in unit.candidates.items()] == list(candidates.items())
    sizes = [len(unit.candidates) for unit in units]
    assert all(size == queries_per_unit for size in sizes[:-1])
    assert all(0 < size <= queries_per_unit for size in sizes)


def test_what_was_used_last_stays_longest() -> None:
    cache = FeatureCache(2 * 4)
    one, two, three = torch.zeros(1), torch.zeros(1), torch.zeros(1)
    cache.put("one", one)
    cache.put("two", two)
    assert cache.get("one") is one
    cache.put("three", three)
    assert (cache.get("one"), cache.get("two"), cache.get("three")) == (one, None, three)
    assert cache.used_bytes == 8


@given(
    st.integers(0, 200),
    st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=40),
    st.lists(st.integers(0, 25), min_size=7, max_size=7),
)
def test_a_cache_never_exceeds_its_bytes_and_forgets_the_least_recently_used(
    capacity_bytes: int, requests: list[tuple[bool, int]], lengths: list[int]
) -> None:
    cache = FeatureCache(capacity_bytes)
    tensors = [torch.zeros(length) for length in lengths]
    kept: list[int] = []  # least recently used first
    for is_put, key in requests:
        if is_put:
            cache.put(key, tensors[key])
            if key not in kept and 4 * lengths[key] <= capacity_bytes:
                kept.append(key)
                while sum(4 * lengths[other] for other in kept) > capacity_bytes:
                    kept.pop(0)
        else:
            found = cache.get(key)
            assert found is (tensors[key] if key in kept else None)
            if key in kept:
                kept.append(kept.pop(kept.index(key)))
        assert cache.used_bytes == sum(4 * lengths[other] for other in kept) <= capacity_bytes
