"""`Localizer` with a calibration: order and confidence are those of the reference without Ray and without an index."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pairvpr import Localizer, Match, RerankConfig, SearchConfig, UserError
from pairvpr.config.schema import DecisionRule
from pairvpr.data import sealed
from pairvpr.data.manifest import Benchmark, folder_manifest
from pairvpr.evaluation.confidence import Calibration, Judge
from pairvpr.evaluation.predictions import final_order, predictions_table
from pairvpr.index.generations import read_images, read_manifest
from pairvpr.models.weights import build_model, find_weights, load_weights
from pairvpr.retrieval import pipeline
from pairvpr.retrieval.decision import Decision, Votes, Weights
from pairvpr.toy import city as toy_city
from tests.support.small import small_evaluate_config

ROOT = Path(__file__).parents[2]
CONFIG = small_evaluate_config("unused", num_candidates=8)
VOTES = Votes(radius_m=25.0, softness=0.7, own=0.5, weight=3.0)
FUSED = Decision(
    weights=Weights(pair_score=4.0, squared_distance=50.0, log_rank=0.1),
    votes=None,
    nothing=-1.0,
    temperature=1.25,
    midpoint=0.5,
    stop_margin=0.05,
)
"""Weights and votes so strong that each rule orders some answers in a way of its own."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos, their index with positions and one without, queries, and a calibration of the network."""
    root = tmp_path_factory.mktemp("decides")
    for part, photos in (
        ("photos", toy_city.database_photos(seed=5, num_places=6, photos_per_place=3)),
        ("queries", toy_city.query_photos(seed=5, num_places=6, photos_per_place=2)),
    ):
        (root / part).mkdir()
        for photo in photos:
            toy_city.draw(photo, width_px=64, height_px=48).save(root / part / photo.path)
    for index, positions in (("index", "names"), ("unplaced", None)):
        options: dict[str, Any] = {"model": CONFIG.model, "describe": CONFIG.describe, "device": "cpu"}
        Localizer.build(root / "photos", root / index, positions=positions, **options)
    calibration = Calibration(
        benchmark="made_up",
        num_queries=50,
        num_candidates=CONFIG.rerank.num_candidates,
        model=CONFIG.model.settings() | {"weights_sha256": find_weights(CONFIG.model).sha256},
        temperature=1.5,
        midpoint=0.25,
        round_size=CONFIG.rerank.batch_size,
        stop_margin=0.05,
        has_positions=True,
        fused=FUSED,
        consensus=replace(FUSED, votes=VOTES),
    )
    sealed.write_json(str(root / "calibration.json"), calibration.content())
    return root


def opened(folder: Path, index: str = "index", **settings: Any) -> Localizer:
    rerank = replace(CONFIG.rerank, calibration=str(folder / "calibration.json"), **settings)
    sections = {"describe": CONFIG.describe, "search": SearchConfig(num_threads_per_actor=1), "rerank": rerank}
    return Localizer.open(folder / index, model=CONFIG.model, device="cpu", **sections)


def reference(folder: Path, rule: DecisionRule, *, adaptive: bool) -> list[dict[str, Any]]:
    """Rows of predictions.parquet, with the final order, by `retrieval.pipeline`."""
    manifest = read_manifest(str(folder / "index"))
    assert manifest is not None
    benchmark = Benchmark(
        name="query",
        database=read_images(str(folder / "index"), manifest),
        queries=folder_manifest(str(folder / "queries"), "queries"),
        positives=None,
        protocol={},
    )
    decision = {DecisionRule.fused: FUSED, DecisionRule.consensus: replace(FUSED, votes=VOTES)}.get(rule)
    network = build_model(CONFIG.model, load_weights(CONFIG.model), torch.device("cpu"))
    answers = pipeline.run(benchmark, network, CONFIG, 0.05 if adaptive else None, decision)
    judge = Judge(1.5, 0.25) if decision is None else Judge(decision.temperature, decision.midpoint)
    rows = predictions_table(benchmark, answers, judge).to_pylist()
    return [row | {"final": final_order(answer).tolist()} for row, answer in zip(rows, answers, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("adaptive", [False, True])
def test_order_and_confidence_are_those_of_the_reference(folder: Path, adaptive: bool) -> None:
    photos = sorted((folder / "queries").iterdir())
    orders = []
    for rule in DecisionRule:
        localizer, rows = opened(folder, decision=rule, adaptive=adaptive), reference(folder, rule, adaptive=adaptive)
        answers = localizer.locate(photos, k=8)
        for matches, row in zip(answers, rows, strict=True):
            assert isinstance(matches, list)
            score_of = dict(zip(row["reranked"], row["pair_scores"], strict=True))
            distance_of = dict(zip(row["candidates"], row["squared_distances"], strict=True))
            assert [match.database_id for match in matches] == row["final"]
            assert [match.pair_score for match in matches] == [score_of[one] for one in row["final"]]
            assert [match.squared_distance for match in matches] == [distance_of[one] for one in row["final"]]
            assert matches[0].confidence == row["confidence"]
            assert all((match.confidence is None) == (rule is not DecisionRule.pair) for match in matches[1:])
        orders.append([row["final"] for row in rows])
        _same_alone(localizer, photos[0], answers[0])
        _says_where(localizer, photos[0], rows[0])
    assert orders[0] != orders[1] != orders[2] != orders[0]


def _same_alone(localizer: Localizer, photo: Path, among: Any) -> None:
    alone = localizer.locate(photo, k=8)
    assert isinstance(among[0], Match)
    assert alone[0].confidence == pytest.approx(among[0].confidence, abs=1e-4)


def _says_where(localizer: Localizer, photo: Path, row: dict[str, Any]) -> None:
    """By every rule, as docs/decision.md says; where a rule decides, it is the position of predictions.parquet."""
    position = localizer.answer(photo, k=8).position
    assert position is not None
    if localizer.decision is not DecisionRule.pair:
        decided = row["estimated_east_m"], row["estimated_north_m"], row["estimated_spread_m"]
        assert (*position.utm, position.spread_m) == pytest.approx(decided, abs=0.1)
    page = (ROOT / "docs" / "decision.md").read_text()
    assert "`Localizer.answer` and the service also give the estimated position, with `pair`,\ntoo" in page


def test_what_can_not_be_decided(folder: Path) -> None:
    for call, says in (
        (lambda: opened(folder, "unplaced", decision=DecisionRule.consensus), "no database photo has a known position"),
        (lambda: opened(folder, decision=DecisionRule.fused, num_candidates=5), "was made for 8 candidates"),
        (lambda: opened(folder, adaptive=True, batch_size=5), "rounds of 3 pairs"),
        (lambda: RerankConfig(decision=DecisionRule.fused), "calibration"),
    ):
        with pytest.raises((UserError, ValueError), match=says) as caught:
            call()
        assert "\n" not in str(caught.value)
