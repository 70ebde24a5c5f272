"""Calibrated confidence, its tables and early stopping, replayed: against drawn truth, sums by hand, plain loops."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pairvpr.config.schema import DecisionRule
from pairvpr.errors import UserError
from pairvpr.evaluation.confidence import (
    HIGHEST_TEMPERATURE,
    LOWEST_TEMPERATURE,
    Bin,
    Calibration,
    CurvePoint,
    Judge,
    Replay,
    ScoredQuery,
    choose_margin,
    expected_calibration_error,
    fit_confidence,
    fit_temperature,
    probability,
    read_calibration,
    reliability,
    unlike_the_network,
)
from pairvpr.retrieval.decision import Decision, Votes, Weights
from pairvpr.retrieval.early_stop import stopped_after

MODEL = {"name": "small", "precision": "fp32", "image_size_px": 28, "weights_sha256": "ab" * 32}
CALIBRATION = Calibration(
    benchmark="made_up",
    num_queries=60,
    num_candidates=10,
    model=MODEL,
    temperature=1.5,
    midpoint=0.5,
    round_size=4,
    stop_margin=2.25,
)


def drawn(temperature: float, midpoint: float, number: int = 10_000) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Scores, and whether they were right, from the model itself."""
    rng = np.random.default_rng(5)
    scores = rng.normal(midpoint + 1, 4, number).astype(np.float32)
    return scores, rng.random(number) < 1 / (1 + np.exp(-(scores.astype(np.float64) - midpoint) / (2 * temperature)))


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("midpoint", [0.0, 4.0, -2.0])
def test_finds_what_the_answers_were_drawn_with(temperature: float, midpoint: float) -> None:
    scores, is_right = drawn(temperature, midpoint)
    found = fit_confidence(scores, is_right)
    assert found == pytest.approx((temperature, midpoint), rel=0.08, abs=0.15)
    if midpoint == 0:
        assert fit_temperature(scores, is_right) == pytest.approx(temperature, rel=0.08)
    error = expected_calibration_error(reliability(probability(scores, *found), is_right))
    assert error is not None
    assert error < 0.02


@pytest.mark.slow
@given(st.lists(st.tuples(st.floats(-9, 9, width=16), st.booleans()), min_size=2, max_size=30))
def test_no_other_temperature_and_midpoint_are_likelier(answers: list[tuple[float, bool]]) -> None:
    scores = np.array([score for score, _ in answers], np.float32)
    is_right = np.array([right for _, right in answers])

    def loss(temperature: float, midpoint: float) -> float:
        logits = (scores.astype(np.float64) - midpoint) / (2 * temperature)
        return float(np.logaddexp(0, np.where(is_right, -logits, logits)).sum())

    grid = np.geomspace(LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE, 40)
    alone = fit_temperature(scores, is_right)
    assert loss(alone, 0.0) <= min(loss(value, 0.0) for value in grid) + 1e-6
    if 0 < is_right.sum() < len(is_right):
        found = fit_confidence(scores, is_right)
        assert LOWEST_TEMPERATURE * (1 - 1e-9) <= found[0] <= HIGHEST_TEMPERATURE * (1 + 1e-9)
        others = [loss(value, midpoint) for value in grid for midpoint in np.linspace(-12, 12, 49)]
        assert loss(*found) <= min(others) + 1e-6


@pytest.mark.parametrize("fit", [fit_temperature, lambda *line: fit_confidence(*line)[0]])
def test_extremes_end_at_the_bounds(fit: Any) -> None:
    scores = np.array([1, 2, 3, -1, -2], np.float32)
    assert fit(scores, scores > 0) == pytest.approx(LOWEST_TEMPERATURE)
    assert fit(scores, scores < 0) == pytest.approx(HIGHEST_TEMPERATURE)
    assert fit(np.abs(scores), np.ones(5, np.bool_)) == pytest.approx(LOWEST_TEMPERATURE)
    assert fit(np.abs(scores), np.zeros(5, np.bool_)) == pytest.approx(HIGHEST_TEMPERATURE)
    assert fit(np.zeros(4, np.float32), np.array([True, False, True, True])) > 0
    assert fit(np.array([1e30, -1e30, 1e30], np.float32), np.array([True, False, False])) > 0


def test_all_right_or_all_wrong_has_no_midpoint() -> None:
    scores = np.array([1, 2, 3], np.float32)
    assert fit_confidence(scores, np.ones(3, np.bool_))[1] == 0
    assert fit_confidence(scores, np.zeros(3, np.bool_))[1] == 0


def test_scores_that_say_the_contrary_leave_the_share() -> None:
    scores = np.array([3, 2, 1, 0], np.float32)
    found = fit_confidence(scores, np.array([False, True, True, True]))
    np.testing.assert_allclose(probability(scores, *found), 0.75, atol=0.01)


@given(st.floats(-(2.0**100), 2.0**100, width=32), st.floats(0.01, 100), st.floats(-50, 50))
def test_a_probability_is_the_sigmoid_and_rises(score: float, temperature: float, midpoint: float) -> None:
    found = probability(np.array([score, score + 1], np.float32), temperature, midpoint)
    logit = max(-700.0, min(700.0, (float(np.float32(score)) - midpoint) / (2 * temperature)))
    assert found[0] == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-12)
    assert found[0] <= found[1]


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=50))
@example([(1.0, True), (0.0, False), (0.1, True)])
def test_reliability_and_its_error_by_brute_force(answers: list[tuple[float, bool]]) -> None:
    bins = reliability(np.array([p for p, _ in answers], np.float64), np.array([right for _, right in answers], bool))
    assert [(row.low, row.high) for row in bins] == [(n / 10, (n + 1) / 10) for n in range(10)]
    error = 0.0
    for number, row in enumerate(bins):
        inside = [(p, right) for p, right in answers if min(int(p * 10), 9) == number]
        assert row.count == len(inside)
        if not inside:
            assert row.mean_confidence is row.share_correct is None
            continue
        mean, share = (sum(column) / len(inside) for column in zip(*inside, strict=True))
        assert (row.mean_confidence, row.share_correct) == pytest.approx((mean, share))
        error += len(inside) / len(answers) * abs(mean - share)
    assert expected_calibration_error(bins) == (pytest.approx(error) if answers else None)


def test_the_error_by_hand() -> None:
    bins = [Bin(0, 0.1, 1, 0.05, 1.0), Bin(0.1, 0.2, 0, None, None), Bin(0.9, 1, 3, 0.95, 0.75)]
    assert expected_calibration_error(bins) == pytest.approx((0.95 + 3 * 0.2) / 4)


@st.composite
def scored_queries(draw: st.DrawFn) -> list[ScoredQuery]:
    """Queries with 0 to 12 candidates, many scores equal."""
    sizes = draw(st.lists(st.integers(0, 12), min_size=1, max_size=8))
    queries = []
    for size in sizes:
        scores = draw(st.lists(st.integers(-4, 4), min_size=size, max_size=size))
        flags = draw(st.lists(st.booleans(), min_size=size, max_size=size))
        queries.append(ScoredQuery(np.array(scores, np.float32), np.array(flags, np.bool_)))
    return queries


@given(scored_queries(), st.integers(1, 14), st.floats(-5, 5) | st.integers(-4, 4))
def test_a_replay_is_a_plain_loop(queries: list[ScoredQuery], round_size: int, threshold: float) -> None:
    right, pairs = 0, 0
    for query in queries:
        scored = stopped_after(query.scores, round_size, threshold)
        order = sorted(range(scored), key=lambda place: (-query.scores[place], place))
        right += bool(order) and bool(query.is_positive[order[0]])
        pairs += scored
    found = Replay(queries, round_size).point(threshold)
    assert found.stop_margin == threshold
    assert (found.recall_at_1, found.pairs_per_query) == pytest.approx(
        (100 * right / len(queries), pairs / len(queries))
    )


@given(scored_queries(), st.integers(1, 14))
def test_the_curve_ascends_to_scoring_everything(queries: list[ScoredQuery], round_size: int) -> None:
    replay = Replay(queries, round_size)
    thresholds = replay.thresholds()
    assert thresholds == sorted(set(thresholds))
    assert bool(thresholds) == any(len(query.scores) > round_size for query in queries)
    curve = replay.curve(thresholds)
    assert [point.pairs_per_query for point in curve] == sorted(point.pairs_per_query for point in curve)
    assert curve[-1].stop_margin is None
    assert curve[-1].recall_at_1 == pytest.approx(100 * np.mean([query.is_right for query in queries]))
    assert curve[-1].pairs_per_query == pytest.approx(np.mean([len(query.scores) for query in queries]))


def test_the_chosen_margin_and_all_above_it_lose_no_more_than_is_allowed() -> None:
    recalls = {1.0: 90.0, 2.0: 87.0, 3.0: 89.95, 4.0: 91.0, 5.0: 89.9, None: 90.0}
    curve = [CurvePoint(threshold, recall, 5.0) for threshold, recall in recalls.items()]
    assert choose_margin(curve, 0.1) == 3.0  # 1.0 would do as well, by chance: 2.0 loses 3 points
    assert choose_margin(curve, 0.05) is None
    assert choose_margin(curve, 3.0) == 1.0
    assert choose_margin(curve[-1:], 100.0) is None


def test_a_judge() -> None:
    confidence = Judge(1.0, 2.0).confidence(np.array([2, 4, -1e9, np.nan], np.float32))
    np.testing.assert_allclose(confidence, [0.5, 1 / (1 + math.exp(-1)), 0, np.nan], rtol=1e-6)
    assert confidence.dtype == np.float32
    assert Judge(1.0).in_map(confidence) is None
    in_map = Judge(1.0, not_in_map_below=0.5).in_map(confidence)
    assert in_map is not None
    assert in_map.tolist() == [True, True, False, False]


def write(folder: Path, content: object) -> str:
    (folder / "calibration.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder / "calibration.json")


def mistake(url: str) -> str:
    with pytest.raises(UserError) as caught:
        read_calibration(url)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"rerank.calibration={url}")
    return str(caught.value)


@pytest.mark.parametrize("stop_margin", [2.25, -0.1, 0.0, None])
def test_a_calibration_comes_back(tmp_path: Path, stop_margin: float | None) -> None:
    content = CALIBRATION.content() | {"stop_margin": stop_margin, "held_out": {"anything": 1}}
    found = read_calibration(write(tmp_path, content))
    assert found.content() == CALIBRATION.content() | {"stop_margin": stop_margin}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 3}, "format version 3; expected 1 to 2"),
        ({"format_version": "2"}, "format version 2; expected 1 to 2"),
        ({"temperature": 0}, "damaged"),
        ({"temperature": math.nan}, "damaged"),
        ({"midpoint": math.inf}, "damaged"),
        ({"midpoint": None}, "damaged"),
        ({"stop_margin": math.inf}, "damaged"),
        ({"stop_margin": "x"}, "damaged"),
        ({"round_size": 0}, "damaged"),
        ({"model": 3}, "damaged"),
    ],
)
def test_what_is_no_calibration(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    assert words in mistake(write(tmp_path, CALIBRATION.content() | changes))


def test_files_that_are_none(tmp_path: Path) -> None:
    assert "no such file; expected one from pairvpr calibrate" in mistake(f"{tmp_path}/none.json")
    assert "can't be read" in mistake(str(tmp_path))
    assert "not JSON" in mistake(write(tmp_path, "{"))
    assert "not a JSON object" in mistake(write(tmp_path, [1]))
    assert "not a calibration" in mistake(write(tmp_path, {"recall": 1}))
    content = CALIBRATION.content()
    del content["temperature"]
    assert "damaged" in mistake(write(tmp_path, content))


def test_another_network_is_refused() -> None:
    CALIBRATION.check("c.json", MODEL | {"precision": "bf16"}, {})
    for key, value in (("name", "vitb"), ("weights_sha256", "cd" * 32), ("image_size_px", 56)):
        with pytest.raises(UserError, match=rf"^rerank\.calibration=c\.json: .* model\.{key} .* there, {value} now"):
            CALIBRATION.check("c.json", MODEL | {key: value}, {})


def test_another_first_stage_is_refused() -> None:
    """A calibration of the network's own descriptors, of a file's and of a user's network, by runs of any other."""
    files = [{}, *({"descriptors": {"width": width, "file": "stamp"}} for width in (512, 8448))]
    modules = [
        {"descriptor": {"module": module, "mean": mean, "weights_sha256": sha256}}
        for module, mean, sha256 in product(("a:b", "a:c"), ([0.0, 0.0, 0.0], [0.5, 0.5, 0.5]), ("ab", "cd"))
    ]
    stages = [unlike_the_network(settings, reduced) for settings in files + modules for reduced in (None, 512)]
    for calibrated, asked in product(stages, stages):
        found = Calibration(**{**CALIBRATION.__dict__, "first_stage": calibrated})
        if calibrated == asked:
            found.check("c.json", MODEL, asked)
            continue
        with pytest.raises(UserError, match=r"^rerank\.calibration=c\.json: .* another first stage: .* there, .* now"):
            found.check("c.json", MODEL, asked)


def test_other_rounds_are_refused() -> None:
    CALIBRATION.check_rounds("c.json", 4)
    with pytest.raises(UserError, match=r"^rerank\.adaptive=true: c\.json is for rounds of 4 pairs, .* is 16"):
        CALIBRATION.check_rounds("c.json", 16)
    endless = Calibration(**{**CALIBRATION.__dict__, "stop_margin": None})
    with pytest.raises(UserError, match=r"has no stop margin \(its run scored 10 candidates in rounds of 4\)"):
        endless.check_rounds("c.json", 4)


FUSED = Decision(
    weights=Weights(pair_score=0.7, squared_distance=9.0, log_rank=0.0),
    votes=None,
    nothing=-6.5,
    temperature=0.5,
    midpoint=-0.25,
    stop_margin=-1.5,
)
CONSENSUS = replace(FUSED, votes=Votes(radius_m=25.0, softness=0.5, own=0.0, weight=1.5), stop_margin=None)
DECIDED = replace(CALIBRATION, has_positions=True, fused=FUSED, consensus=CONSENSUS)


@pytest.mark.parametrize("consensus", [CONSENSUS, None])
def test_decisions_come_back(tmp_path: Path, consensus: Decision | None) -> None:
    calibration = replace(DECIDED, consensus=consensus)
    assert read_calibration(write(tmp_path, calibration.content())) == calibration


def test_a_file_of_an_earlier_version_has_no_decisions(tmp_path: Path) -> None:
    content = CALIBRATION.content() | {"format_version": 1}
    for name in ("has_positions", "fused", "consensus"):
        del content[name]
    found = read_calibration(write(tmp_path, content))
    assert found == CALIBRATION
    assert found.decision("c.json", DecisionRule.pair, 99) is None
    with pytest.raises(UserError, match=r"^rerank\.decision=fused: c\.json has no decisions: .*; expected .* pair$"):
        found.decision("c.json", DecisionRule.fused, 10)


@pytest.mark.parametrize(
    "changes",
    [
        {"has_positions": 1},
        {"has_positions": None},
        {"fused": CONSENSUS},
        {"consensus": FUSED},
        {"fused": []},
        {"fused": asdict(FUSED) | {"nothing": math.nan}},
        {"fused": asdict(FUSED) | {"nothing": "x"}},
        {"fused": asdict(FUSED) | {"temperature": 0}},
        {"fused": asdict(FUSED) | {"more": 1}},
        {"fused": asdict(FUSED) | {"weights": asdict(FUSED.weights) | {"log_rank": -1.0}}},
        {"consensus": asdict(CONSENSUS) | {"votes": {"radius_m": 25.0}}},
        {"fused": None},
    ],
)
def test_decisions_that_are_none(tmp_path: Path, changes: dict[str, Any]) -> None:
    plain = {name: asdict(value) if isinstance(value, Decision) else value for name, value in changes.items()}
    assert "damaged" in mistake(write(tmp_path, DECIDED.content() | plain))


def test_decisions_of_another_run_are_refused() -> None:
    assert DECIDED.decision("c.json", DecisionRule.fused, 10) == FUSED
    assert DECIDED.decision("c.json", DecisionRule.consensus, 10) == CONSENSUS
    for changes, num_candidates, words in (
        ({}, 20, r"was made for 10 candidates, but rerank\.num_candidates is 20; expected the same$"),
        ({"consensus": None, "has_positions": False}, 10, r"photos have no positions.*expected .* pair, fused$"),
        ({"consensus": None}, 10, r"has no votes: they did not prove themselves.*expected .* pair, fused$"),
    ):
        with pytest.raises(UserError, match=rf"^rerank\.decision=consensus: c\.json .*{words}"):
            replace(DECIDED, **changes).decision("c.json", DecisionRule.consensus, num_candidates)
    DECIDED.check_rounds("c.json", 4, FUSED)
    with pytest.raises(UserError, match="has no stop margin"):
        DECIDED.check_rounds("c.json", 4, CONSENSUS)
