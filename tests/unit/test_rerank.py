"""Re-ranking against the plain network in a loop, and how often it describes a photo."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from pairvpr.models.pair_scorer import PairScorer
from pairvpr.models.pair_vpr import PairVPR
from pairvpr.retrieval import rerank
from pairvpr.retrieval.early_stop import stopped_after
from pairvpr.retrieval.rerank import Reranked, Reranker, WorkUnit, work_units
from tests.support.small import shaken_model

NUM_DATABASE, NUM_QUERIES = 12, 5
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
    """Embedded features by id that count how often each was asked for, and the forward passes that they went into."""

    def __init__(self, features: tuple[Tensor, Tensor], model: PairVPR) -> None:
        with torch.no_grad():
            self.queries, self.database = (model.embed(dense) for dense in features)
        self.model = model
        self.query_calls: Counter[int] = Counter()
        self.database_calls: Counter[int] = Counter()

    def of_queries(self, query_ids: Sequence[int]) -> Iterator[Tensor]:
        self.query_calls.update(query_ids)
        return iter(self.queries[list(query_ids)])

    def of_database(self, image_ids: Sequence[int]) -> Iterator[Tensor]:
        self.database_calls.update(image_ids)
        return iter(self.database[list(image_ids)])

    def reranker(self, batch_size: int = 3, **options: Any) -> Reranker:
        return Reranker(
            self.model,
            batch_size=batch_size,
            query_features=self.of_queries,
            database_features=self.of_database,
            **options,
        )


def both_logits(
    model: PairVPR, features: tuple[Tensor, Tensor], candidates: Mapping[int, Sequence[int]]
) -> dict[int, NDArray[np.float64]]:
    """Logits (2, K) of every query's candidates, one pair and one direction at a time."""
    queries, database = features
    with torch.no_grad():
        return {
            query_id: np.array(
                [
                    [float(model.pair_logits(*pair)) for pair in pairs]
                    for pairs in zip(
                        *(
                            ((queries[[query_id]], database[[image_id]]), (database[[image_id]], queries[[query_id]]))
                            for image_id in ids
                        ),
                        strict=True,
                    )
                ]
            ).reshape(2, len(ids))
            for query_id, ids in candidates.items()
        }


def ranked(ids: Sequence[int], scores: NDArray[np.float64]) -> tuple[list[int], NDArray[np.float64]]:
    """Best first; all scores here are different."""
    order = np.argsort(-scores, kind="stable")
    return [ids[place] for place in order], scores[order]


def assert_ranked(answer: Reranked, ids: Sequence[int], scores: NDArray[np.float64]) -> None:
    """The answer's ids and scores."""
    expected_ids, expected_scores = ranked(ids, scores)
    assert answer.ids.tolist() == expected_ids
    np.testing.assert_allclose(answer.pair_scores, expected_scores, rtol=0, atol=1e-5)
    assert (answer.ids.dtype, answer.pair_scores.dtype) == (np.int64, np.float32)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_scores_and_order_are_those_of_the_plain_network(
    model: PairVPR, features: tuple[Tensor, Tensor], batch_size: int
) -> None:
    answers = Photos(features, model).reranker(batch_size).rerank(WorkUnit(0, UNIT))
    logits = both_logits(model, features, UNIT)
    assert [answer.query_id for answer in answers] == list(UNIT)
    assert len(set(logits[3].sum(axis=0).round(3))) == NUM_DATABASE  # the order is a real one
    for answer in answers:
        assert_ranked(answer, UNIT[answer.query_id], logits[answer.query_id].sum(axis=0))


@pytest.mark.parametrize("number", [1, 2, 5, 100])
def test_the_second_direction_of_the_best_alone(model: PairVPR, features: tuple[Tensor, Tensor], number: int) -> None:
    answers = Photos(features, model).reranker(second_direction=number).rerank(WorkUnit(0, UNIT))
    for answer, (query_first, other) in zip(answers, both_logits(model, features, UNIT).values(), strict=True):
        is_best = np.isin(np.arange(len(query_first)), np.argsort(-query_first)[:number])
        assert_ranked(answer, UNIT[answer.query_id], query_first + np.where(is_best, other, query_first))


@pytest.mark.parametrize("batch_size", [1, 3, 5, 100])
def test_a_query_is_finished_where_its_margin_is_large_enough(
    model: PairVPR, features: tuple[Tensor, Tensor], batch_size: int
) -> None:
    """As many candidates are scored as replaying the rule over all scores says."""
    scores = {query_id: its.sum(axis=0) for query_id, its in both_logits(model, features, UNIT).items()}
    for stop_margin in (-100.0, float(np.median(scores[3][:4])), float(scores[3].max()) - 1e-3, 100.0):
        reranker = Photos(features, model).reranker(batch_size, stop_margin=stop_margin)
        for answer in reranker.rerank(WorkUnit(0, UNIT)):
            its = scores[answer.query_id].astype(np.float32)
            num_scored = stopped_after(its, batch_size, stop_margin) if len(its) else 0
            expected = np.where(np.arange(len(its)) < num_scored, its, -np.inf)
            assert_ranked(answer, UNIT[answer.query_id], expected)


def test_equal_scores_keep_the_order_of_retrieval(
    model: PairVPR, features: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network rounds by place in the batch, so logits that tie are given here: 1, 0, -0.0 and 1 again."""
    logits = iter([torch.tensor([0.0, 1.0, -0.0]), torch.tensor([1.0, -2.0, 0.0]), torch.tensor([1.0])])
    nothing = iter([torch.zeros(3), torch.zeros(3), torch.zeros(1)])
    reranker = Photos(features, model).reranker(3)
    directions = iter([logits, nothing] * 3)
    monkeypatch.setattr(PairScorer, "logits", lambda *_: next(next(directions)))
    (answer,) = reranker.rerank(WorkUnit(0, {0: [8, 1, 9, 4, 3, 2, 6]}))
    assert answer.ids.tolist() == [1, 4, 6, 8, 9, 2, 3]
    assert answer.pair_scores.tolist() == [1, 1, 1, 0, 0, 0, -2]


def test_many_equal_scores_keep_the_order_of_retrieval(
    model: PairVPR, features: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enough of them that a sort which is not stable mixes them up."""
    candidates = np.random.default_rng(0).permutation(240)
    photos = Photos((features[0], torch.zeros(240, 4, 32)), model)
    monkeypatch.setattr(PairScorer, "logits", lambda *_: torch.arange(240) % 2)  # by place in the pass
    (answer,) = photos.reranker(1000).rerank(WorkUnit(0, {0: candidates.tolist()}))
    assert answer.ids.tolist() == [*candidates[1::2], *candidates[::2]]


def test_each_photo_is_asked_for_once_in_a_unit(model: PairVPR, features: tuple[Tensor, Tensor]) -> None:
    photos = Photos(features, model)
    photos.reranker().rerank(WorkUnit(0, UNIT))
    assert photos.database_calls == Counter({image_id for ids in UNIT.values() for image_id in ids})
    assert photos.query_calls == Counter(query_id for query_id, ids in UNIT.items() if ids)


@given(
    st.lists(st.lists(st.integers(0, 9), unique=True, max_size=8), max_size=6),
    st.integers(1, 7),
)
def test_forward_passes_hold_whole_candidates(asked: list[list[int]], batch_size: int) -> None:
    pairs = [rerank._Pair(row, place, image_id) for row, ids in enumerate(asked) for place, image_id in enumerate(ids)]
    batches = rerank._batches(pairs, batch_size)
    assert sorted(map(repr, (pair for batch in batches for pair in batch))) == sorted(map(repr, pairs))
    assert all(0 < len(batch) <= batch_size for batch in batches)
    num_pairs = Counter(pair.image_id for pair in pairs)
    for image_id, number in num_pairs.items():
        passes = [batch for batch in batches if any(pair.image_id == image_id for pair in batch)]
        assert len(passes) == -(-number // batch_size)


def test_no_candidates_no_answers(model: PairVPR, features: tuple[Tensor, Tensor]) -> None:
    reranker = Photos(features, model).reranker()
    assert reranker.rerank(WorkUnit(0, {})) == []
    (answer,) = reranker.rerank(WorkUnit(0, {2: []}))
    assert (answer.query_id, answer.ids.tolist(), answer.pair_scores.tolist()) == (2, [], [])
    assert (answer.ids.dtype, answer.pair_scores.dtype) == (np.int64, np.float32)


CANDIDATES = st.dictionaries(st.integers(0, 50), st.lists(st.integers(0, 9), unique=True, max_size=4), max_size=12)


@given(CANDIDATES, st.integers(1, 14))
def test_work_units_hold_every_query_once(candidates: dict[int, list[int]], queries_per_unit: int) -> None:
    units = work_units(candidates, queries_per_unit)
    assert [unit.unit for unit in units] == list(range(len(units)))
    assert sum(len(unit.candidates) for unit in units) == len(candidates)
    assert {query_id: ids for unit in units for query_id, ids in unit.candidates.items()} == candidates
    sizes = [len(unit.candidates) for unit in units]
    assert all(size == queries_per_unit for size in sizes[:-1])
    assert all(0 < size <= queries_per_unit for size in sizes)


@given(CANDIDATES, st.integers(1, 14))
def test_a_unit_takes_the_query_that_shares_most(candidates: dict[int, list[int]], queries_per_unit: int) -> None:
    """Against the rule written as a loop over all queries left."""
    left, last = list(candidates), set[int]()
    for unit in work_units(candidates, queries_per_unit):
        union = last
        for number, query_id in enumerate(unit.candidates):
            shared = [len(union & set(candidates[other])) for other in left]
            assert query_id == left[shared.index(max(shared))]
            left.remove(query_id)
            union = (union if number else set()) | set(candidates[query_id])
        last = union
