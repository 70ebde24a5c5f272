"""A decision is a pure function of one query's candidates: against plain loops over every pair of them."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pairvpr.retrieval.decision import PLACE_RADIUS_M, Decided, Decider, Decision, Votes, Weights, decide

WEIGHTS = Weights(pair_score=0.7, squared_distance=9.0, log_rank=0.3)
VOTES = Votes(radius_m=10.0, softness=0.4, own=0.5, weight=2.0)
FUSED = Decision(weights=WEIGHTS, votes=None, nothing=-6.0, temperature=0.5, midpoint=0.0, stop_margin=None)
CONSENSUS = Decision(weights=WEIGHTS, votes=VOTES, nothing=-6.0, temperature=0.5, midpoint=0.0, stop_margin=None)

numbers = st.integers(-6, 6).map(float)
candidate = st.tuples(
    st.integers(0, 8).map(lambda n: n / 8),  # squared distance
    numbers | st.just(-math.inf) | st.just(math.nan),  # pair score; not finite: not scored
    st.tuples(st.integers(0, 40).map(float), st.integers(0, 5).map(float)) | st.just((math.nan, math.nan)),
)


def arrays(rows: list[tuple[float, float, tuple[float, float]]]) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Ids that are not their places, distances, scores, metres."""
    distances, scores, metres = zip(*rows, strict=True) if rows else ((), (), ())
    return (
        100 + np.arange(len(rows)) * 7 % 97,
        np.array(distances, np.float32),
        np.array(scores, np.float32),
        np.array(metres, np.float64).reshape(-1, 2),
    )


def plain(decision: Decision, rows: list[tuple[float, float, tuple[float, float]]]) -> list[float]:
    """Evidence by the definition in docs/decision.md."""
    weights, votes = decision.weights, decision.votes
    own = [
        weights.pair_score * score - weights.squared_distance * distance - weights.log_rank * math.log(1 + place)
        if math.isfinite(score)
        else -math.inf
        for place, (distance, score, _) in enumerate(rows)
    ]
    if votes is None or all(math.isinf(its) for its in own):
        return own
    voices = [math.exp(votes.softness * (its - max(own))) for its in own]
    found = []
    for one, its in enumerate(own):
        near = sum(
            voice
            for other, voice in enumerate(voices)
            if one == other or math.dist(rows[one][2], rows[other][2]) <= votes.radius_m
        )
        share = max(near, np.finfo(np.float64).tiny) / sum(voices)
        found.append(-math.inf if math.isinf(its) else votes.own * its + votes.weight * math.log(share))
    return found


@pytest.mark.parametrize("decision", [FUSED, CONSENSUS])
@settings(max_examples=40)
@given(rows=st.lists(candidate, max_size=8))
def test_order_odds_and_position_by_plain_loops(
    decision: Decision, rows: list[tuple[float, float, tuple[float, float]]]
) -> None:
    ids, distances, scores, metres = arrays(rows)
    found, evidence = decide(decision, ids, distances, scores, metres), plain(decision, rows)
    assert sorted(found.ids.tolist()) == sorted(ids.tolist())
    place_of = {image_id: place for place, image_id in enumerate(ids.tolist())}
    order = [place_of[image_id] for image_id in found.ids.tolist()]
    np.testing.assert_allclose(found.evidence, [evidence[place] for place in order], rtol=1e-5, atol=1e-5)
    for before, after in pairwise(order):
        close = evidence[before] - evidence[after] if evidence[before] != evidence[after] else 0.0
        assert close > -1e-9
        assert close != 0 or before < after  # equals keep the order of retrieval
    if not rows or math.isinf(max(evidence)):
        assert math.isnan(found.log_odds)
        return
    best = order[0]
    radius_m = PLACE_RADIUS_M if decision.votes is None else decision.votes.radius_m
    place = [one for one in range(len(rows)) if one == best or math.dist(rows[one][2], rows[best][2]) <= radius_m]
    inside = place if decision.votes is not None else [best]
    mass = sum(math.exp(evidence[one]) for one in inside)
    rest = sum(math.exp(evidence[one]) for one in range(len(rows)) if one not in inside) + math.exp(decision.nothing)
    assert found.log_odds == pytest.approx(math.log(mass / rest), abs=1e-6)
    if math.isnan(rows[best][2][0]):
        assert math.isnan(found.position_m[0])
        assert math.isnan(found.spread_m)
        return
    shares = [math.exp(evidence[one]) for one in place]
    mean = [sum(s * rows[one][2][axis] for s, one in zip(shares, place, strict=True)) / sum(shares) for axis in (0, 1)]
    spread = sum(s * math.dist(rows[one][2], mean) ** 2 for s, one in zip(shares, place, strict=True)) / sum(shares)
    assert found.position_m == pytest.approx(mean, abs=1e-6)
    assert found.spread_m == pytest.approx(math.sqrt(spread), abs=1e-4)


def test_neighbours_outvote_a_single_better_one() -> None:
    """Three photos of a place, each a little behind a lone wrong one."""
    ids = np.arange(4)
    distances, scores = np.full(4, 0.5, np.float32), np.array([2.0, 1.8, 1.8, 1.8], np.float32)
    metres = np.array([[500.0, 0.0], [0.0, 0.0], [3.0, 0.0], [0.0, 3.0]])
    by_rule = {name: decide(its, ids, distances, scores, metres) for name, its in (("f", FUSED), ("c", CONSENSUS))}
    assert (by_rule["f"].ids[0], by_rule["c"].ids[0]) == (0, 1)
    assert by_rule["f"].position_m == (500.0, 0.0)
    assert by_rule["c"].position_m == pytest.approx((1.0, 1.0), abs=0.2)
    assert 0 < by_rule["c"].spread_m < 3


def test_far_evidence_neither_overflows_nor_ends_at_nan() -> None:
    ids, distances = np.arange(3), np.zeros(3, np.float32)
    scores, metres = np.array([1e30, -1e30, 0], np.float32), np.zeros((3, 2))
    for decision in (FUSED, CONSENSUS):
        found = decide(decision, ids, distances, scores, metres)
        assert found.ids.tolist() == [0, 2, 1]
        assert not np.isnan(found.evidence).any()
        assert found.log_odds > 1e20
        assert found.position_m == (0.0, 0.0)


def test_a_decider_takes_what_was_re_ranked_in_the_order_of_retrieval() -> None:
    utm_m = np.array([[float(number), 0.0] for number in range(50)])
    candidates, distances = np.array([40, 10, 30, 20]), np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    reranked, pair_scores = np.array([30, 40, 10]), np.array([3.0, 2.0, 1.0], np.float32)
    found = Decider(FUSED, utm_m).decide(candidates, distances, reranked, pair_scores)
    scores = np.array([2.0, 1.0, 3.0], np.float32)
    wanted = decide(FUSED, candidates[:3], distances[:3], scores, utm_m[candidates[:3]])
    assert found.ids.tolist() == wanted.ids.tolist()
    assert found.evidence.tobytes() == wanted.evidence.tobytes()
    assert (found.log_odds, found.position_m, found.spread_m) == (wanted.log_odds, wanted.position_m, wanted.spread_m)


def test_a_query_without_candidates() -> None:
    nothing = np.empty(0, np.int64), np.empty(0, np.float32)
    found: Decided = Decider(CONSENSUS, np.empty((0, 2))).decide(*nothing, *nothing)
    assert (len(found.ids), len(found.evidence)) == (0, 0)
    assert np.isnan([found.log_odds, *found.position_m, found.spread_m]).all()


@pytest.mark.parametrize("name", ["pair_score", "squared_distance", "log_rank"])
def test_weights_below_zero_are_none(name: str) -> None:
    with pytest.raises(ValueError, match="out of range"):
        Weights(**{"pair_score": 1.0, "squared_distance": 1.0, "log_rank": 1.0, name: -0.1})
