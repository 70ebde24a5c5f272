"""Decisions fitted to drawn queries: the terms that matter are found, and no other weights are likelier."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairvpr.evaluation.fit_decision import (
    PRIOR_SD,
    Fit,
    LocatedQuery,
    _most_likely,
    decided_right,
    fit_consensus,
    fit_fused,
    fit_without,
)
from tests.support.decision import K, drawn


def share_right(fit: Fit, queries: list[LocatedQuery]) -> float:
    return float(np.mean([decided_right(fit.decision, query)[0] for query in queries]))


def test_both_terms_and_votes_prove_themselves_and_help() -> None:
    fitted, others = drawn(200), drawn(150, seed=6)
    fused = fit_fused(fitted)
    assert fused is not None
    assert fused.terms[:2] == ("pair_score", "squared_distance")
    consensus = fit_consensus(fitted, fused)
    assert consensus is not None
    assert consensus.terms == (*fused.terms, "votes")
    assert consensus.decision.weights == fused.decision.weights
    pair = float(np.mean([query.is_right for query in others]))
    assert pair + 0.05 < share_right(fused, others)
    assert share_right(fused, others) + 0.02 < share_right(consensus, others)
    for term in ("pair_score", "squared_distance"):
        assert share_right(fit_without(fitted, fused, term), others) < share_right(fused, others)
    assert fit_without(fitted, consensus, "votes").decision.weights == fused.decision.weights
    without = fit_without(fitted, consensus, "squared_distance")
    assert without.decision.votes is not None
    assert without.decision.weights.squared_distance == 0


def test_terms_that_say_nothing_are_left_out() -> None:
    found = fit_fused(drawn(150, distance=0))
    assert found is not None
    assert found.decision.weights.squared_distance == 0
    assert fit_fused(drawn(150, pair=0)) is None
    assert fit_fused(drawn(150, pair=-1)) is None
    fitted = drawn(150, clusters=False)
    fused = fit_fused(fitted)
    assert fused is not None
    assert fit_consensus(fitted, fused) is None
    unknown = drawn(150, positions=False)
    fused = fit_fused(unknown)
    assert fused is not None
    assert fit_consensus(unknown, fused) is None


def test_queries_without_candidates_and_shorter_ones_change_nothing_of_the_others() -> None:
    queries = drawn(100)
    none = LocatedQuery(np.empty(0, np.float32), np.empty(0, np.bool_), np.empty(0, np.float32), np.empty((0, 2)))
    found = fit_fused(queries)
    assert found is not None
    assert found == fit_fused([none, *queries, none])
    assert not decided_right(found.decision, none)[0]
    cut = [
        LocatedQuery(query.scores[:n], query.is_positive[:n], query.squared_distances[:n], query.utm_m[:n])
        for query, n in zip(queries, np.arange(100) % K + 1, strict=True)
    ]
    assert fit_fused(cut) is not None


def test_scores_that_never_err_stay_finite() -> None:
    found = fit_fused(drawn(80, pair=50))
    assert found is not None
    assert math.isfinite(found.decision.weights.pair_score)
    assert share_right(found, drawn(80, pair=50)) > 0.9


@settings(max_examples=15)
@given(st.integers(0, 10_000))
def test_no_neighbouring_weights_are_likelier(seed: int) -> None:
    """The objective written as a loop; weights may not be below 0."""
    rng = np.random.default_rng(seed)
    features = rng.normal(0, 1, (15, 4, 2))
    is_positive = rng.random((15, 4)) < 1 / (1 + np.exp(1 - features[:, :, 0]))
    is_candidate = np.arange(4) < rng.integers(1, 5, 15)[:, None]
    spread, centre = features[is_candidate].std(axis=0), features[is_candidate].mean(axis=0)

    def objective(weights: np.ndarray, nothing: float) -> float:
        total = 0.0
        for query in range(15):
            terms = [math.exp(features[query, one] @ weights) for one in range(4) if is_candidate[query, one]]
            right = [
                math.exp(features[query, one] @ weights)
                for one in range(4)
                if is_candidate[query, one] and is_positive[query, one]
            ]
            total += math.log((sum(right) if right else math.exp(nothing)) / (sum(terms) + math.exp(nothing)))
        scaled = weights * spread
        return total - ((scaled**2).sum() + (nothing - weights @ centre) ** 2) / (2 * PRIOR_SD**2)

    found = _most_likely(features, is_candidate, is_positive)
    weights = np.array(found.weights)
    assert (weights >= 0).all()
    best = objective(weights, found.nothing)
    for step in (-0.02, 0.02):
        for axis in (0, 1):
            other = weights.copy()
            other[axis] += step
            if weights[axis] > 0 and other[axis] >= 0:
                # "none of them" moves along: its own coordinate is free as well
                assert objective(other, found.nothing + step * centre[axis]) <= best + 1e-6
        assert objective(weights, found.nothing + step) <= best + 1e-6


@pytest.mark.parametrize("count", [50, 200])
def test_confidence_is_that_of_the_fitted_queries(count: int) -> None:
    """As many are expected to be right as are."""
    queries = drawn(count)
    found = fit_fused(queries)
    assert found is not None
    right, odds = zip(*(decided_right(found.decision, query) for query in queries), strict=True)
    expected = 1 / (1 + np.exp(-(np.array(odds) - found.decision.midpoint) / (2 * found.decision.temperature)))
    assert expected.mean() == pytest.approx(np.mean(right), abs=0.01)
