"""The job calibrate: what it reads, fits and writes, and the runs it refuses."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pairvpr.cli import run_job
from pairvpr.config.compose import load
from pairvpr.config.schema import CalibrateConfig, DecisionRule
from pairvpr.data import sealed, storage
from pairvpr.data.manifest import Benchmark, Manifest
from pairvpr.errors import UserError
from pairvpr.evaluation.calibrate import NUM_BLOCKS, calibrate, held_out_queries
from pairvpr.evaluation.confidence import (
    Replay,
    ScoredQuery,
    expected_calibration_error,
    fit_confidence,
    probability,
    read_calibration,
    reliability,
)
from pairvpr.evaluation.fit_decision import LocatedQuery, decided_right, fit_consensus, fit_fused
from pairvpr.evaluation.predictions import predictions_table, write_predictions
from pairvpr.evaluation.report import RunFacts, metrics
from pairvpr.index.generations import ImageTable, IndexManifest, ShardEntry, StoredFile, commit
from pairvpr.retrieval.pipeline import Answer
from tests.support.decision import K, drawn
from tests.support.small import small_model_config

NUM_QUERIES, NUM_CANDIDATES, ROUND_SIZE = 160, 10, 3
MODEL = {"name": "small", "precision": "fp32", "weights_sha256": "ab" * 32}
SETTINGS = {"model": MODEL, "rerank": {"batch_size": ROUND_SIZE, "num_candidates": NUM_CANDIDATES}}
FACTS = RunFacts(
    index={"kind": "flat"},
    weights_sha256="ab" * 32,
    untrained=False,
    num_candidates=NUM_CANDIDATES,
    seconds_describe=0.0,
    seconds_retrieve=0.0,
    seconds_rerank=0.0,
    num_rejected_database=0,
    num_rejected_queries=0,
)


def queries(number: int = NUM_QUERIES, share: float = 0.7) -> list[ScoredQuery]:
    """A positive stands among the first candidates of most queries and has, mostly, a good score; one is unreadable."""
    rng = np.random.default_rng(4)
    made = []
    for query_id in range(number):
        scores = rng.normal(1.0, 1.5, NUM_CANDIDATES).astype(np.float32)
        is_positive = np.zeros(NUM_CANDIDATES, np.bool_)
        if rng.random() < share:
            place = int(rng.exponential(1.5)) % NUM_CANDIDATES
            is_positive[place], scores[place] = True, rng.normal(5.0, 2.0)
        made.append(ScoredQuery(scores, is_positive))
        if query_id == 7:
            made[-1] = ScoredQuery(scores[:0], is_positive[:0])
    return made


def write_run(folder: Path, its: list[ScoredQuery], *, ground_truth: bool = True, **changes: Any) -> str:
    """The files of a finished evaluation; candidates of query q are q, q + 1, ..., kept: two more than were scored."""
    answers, positives = [], []
    for query_id, query in enumerate(its):
        ids = query_id + np.arange(len(query.scores))
        kept = np.concatenate([ids, ids[-1:] + 1, ids[-1:] + 2])
        answers.append(answer(query, query_id, kept, np.linspace(0, 1, len(kept), dtype=np.float32)))
        positives.append(ids[query.is_positive])
    return write_answers(folder, answers, positives if ground_truth else None, len(its) + 20, **changes)


def write_located_run(folder: Path, its: list[LocatedQuery]) -> str:
    """The same with an index that knows positions; no two queries have a candidate in common."""
    answers, positives = [], []
    for query_id, query in enumerate(its):
        ids = query_id * K + np.arange(K)
        answers.append(answer(query, query_id, ids, query.squared_distances))
        positives.append(ids[query.is_positive])
    index = f"{folder}/index"
    photos = Manifest.of("/d", [f"{number:04d}.jpg" for number in range(len(its) * K)])
    photos.with_positions(np.concatenate([query.utm_m for query in its])).write(f"{index}/images.parquet")
    table = f"{index}/images.parquet"
    file = StoredFile(path="images.parquet", bytes=storage.size_bytes(table), sha256=storage.sha256(table))
    rows = {name: StoredFile(path=name, bytes=0, sha256="0" * 64) for name in ("ids.npy", "descriptors.npy")}
    count = len(photos)
    manifest = IndexManifest(
        generation=1,
        model={"name": "small", "weights_sha256": "ab" * 32},
        descriptor_dim=8,
        kind="flat",
        factory="Flat",
        num_images=len(photos),
        num_rejected=0,
        num_removed=0,
        images_root="/d",
        images=[ImageTable(file=file, first_id=0, count=count)],
        removed=[],
        shards=[ShardEntry(path="shards/00000", first_id=0, count=count, num_rows=count, num_removed=0, files=rows)],
    )
    commit(index, manifest)
    return write_answers(folder, answers, positives, len(photos), index={"path": index})


def answer(query: ScoredQuery, query_id: int, ids: NDArray[np.int64], distances: NDArray[np.float32]) -> Answer:
    """The first of these candidates, as many as have scores, are re-ranked."""
    order = np.argsort(-query.scores, kind="stable")
    return Answer(query_id, ids, distances, ids[order], query.scores[order])


def write_answers(
    folder: Path, answers: list[Answer], positives: list[NDArray[np.int64]] | None, num_photos: int, **changes: Any
) -> str:
    """The files of a run."""
    benchmark = Benchmark(
        name="made_up",
        database=Manifest.of("/d", [f"{number:04d}.jpg" for number in range(num_photos)]),
        queries=Manifest.of("/q", [f"{number:04d}.jpg" for number in range(len(answers))]),
        positives=positives,
        protocol={"positives": "radius", "radius_m": 25.0},
    )
    facts = replace(FACTS, num_candidates=max(len(its.reranked) for its in answers))
    write_predictions(f"{folder}/predictions.parquet", predictions_table(benchmark, answers))
    storage.write_json(f"{folder}/metrics.json", metrics(benchmark, answers, small_model_config(), facts))
    storage.write_json(f"{folder}/settings.json", SETTINGS | changes)
    return str(folder)


def calibrated(url: str, folder: Path, **settings: Any) -> dict[str, Any]:
    return calibrate(CalibrateConfig(predictions=url, output=f"{folder}/calibration.json", **settings))


def mistake(url: str, folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        calibrated(url, folder)
    assert "\n" not in str(caught.value)
    assert url in str(caught.value)
    assert not (folder / "calibration.json").exists()
    return str(caught.value)


def test_the_first_stage_of_the_run_is_kept(tmp_path: Path) -> None:
    """As evaluate's settings.json says it; without a file and a reduction there is nothing to keep."""
    of_a_file = {"descriptors": {"width": 8448, "file": "1:2"}, "index_reduce_to": 512}
    content = calibrated(write_run(tmp_path / "run", queries(), **of_a_file), tmp_path)
    assert content["first_stage"] == {"file_width": 8448, "reduced_to": 512}
    assert read_calibration(f"{tmp_path}/calibration.json").first_stage == content["first_stage"]
    assert calibrated(write_run(tmp_path / "own", queries()), tmp_path)["first_stage"] == {}


def test_fits_to_one_half_and_reports_on_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    its = queries()
    content = calibrated(write_run(tmp_path / "run", its), tmp_path, max_loss=2.0)
    assert content == sealed.read_json(str(tmp_path / "calibration.json"), "")
    is_held_out = held_out_queries(NUM_QUERIES)
    fitted, others = ([query for query, flag in zip(its, is_held_out, strict=True) if flag == half] for half in (0, 1))
    assert (content["num_queries"], content["held_out"]["num_queries"]) == (len(fitted), len(others)) == (80, 80)

    scores = [np.array([query.scores.max() for query in half if len(query.scores)]) for half in (fitted, others)]
    right = [np.array([query.is_right for query in half if len(query.scores)]) for half in (fitted, others)]
    found = fit_confidence(scores[0], right[0])
    assert (content["temperature"], content["midpoint"]) == found
    error = expected_calibration_error(reliability(probability(scores[1], *found), right[1]))
    after, before = content["held_out"]["after"], content["held_out"]["before"]
    assert after["expected_calibration_error"] == error
    assert error < before["expected_calibration_error"]
    assert sum(row["count"] for row in after["reliability"]) == len(scores[1])

    margin, replay = content["stop_margin"], Replay(fitted, ROUND_SIZE)
    assert replay.point(None).recall_at_1 - replay.point(margin).recall_at_1 <= 2.0
    assert replay.point(margin).pairs_per_query < 0.9 * NUM_CANDIDATES
    at_margin = Replay(others, ROUND_SIZE).point(margin)
    assert content["held_out"]["at_stop_margin"]["pairs_per_query"] == at_margin.pairs_per_query
    assert content["held_out"]["curve"][-1]["stop_margin"] is None
    calibration = read_calibration(f"{tmp_path}/calibration.json")
    assert (calibration.model, calibration.round_size, calibration.num_candidates) == (MODEL, ROUND_SIZE, 10)
    text = capsys.readouterr().out
    assert f"stopping at margin {margin:.3f}, rounds of 3: recall@1 {at_margin.recall_at_1:.1f} with" in text
    assert f"{error:.3f} after" in text


def test_decisions_are_fitted_to_one_half(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    its = drawn(240)
    content = calibrated(write_located_run(tmp_path / "run", its), tmp_path, max_loss=2.0)
    is_held_out = held_out_queries(len(its))
    fitted, others = ([query for query, flag in zip(its, is_held_out, strict=True) if flag == half] for half in (0, 1))
    fused = fit_fused(fitted)
    assert fused is not None
    consensus = fit_consensus(fitted, fused)
    assert consensus is not None
    found = read_calibration(f"{tmp_path}/calibration.json")
    assert found.has_positions
    for rule, fit, read in (("fused", fused, found.fused), ("consensus", consensus, found.consensus)):
        assert read is not None
        assert replace(read, stop_margin=None) == fit.decision
        assert found.decision("c.json", DecisionRule(rule), 12) == read
        assert read.stop_margin == found.fused.stop_margin  # type: ignore[union-attr]
        report = content["held_out"]["decisions"][rule]
        right = np.mean([decided_right(fit.decision, query)[0] for query in others])
        assert report["recall_at_1"] == pytest.approx(100 * right)
        gain = right - np.mean([query.is_right for query in others])
        assert report["more_than_pair"]["points"] == pytest.approx(100 * gain)
        assert set(report["more_than_without"]) == set(fit.terms)
        assert (
            report["curve"][-1]["recall_at_1"] == content["held_out"]["decisions"]["fused"]["curve"][-1]["recall_at_1"]
        )
    text = capsys.readouterr().out
    assert "rerank.decision=consensus: recall@1" in text
    assert "this without votes" in text
    assert "by the evidence of rerank.decision=fused and consensus:" in text


def test_without_positions_there_is_no_consensus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An index that is gone, one without positions, and a run whose settings name none."""
    its = drawn(160, positions=False)
    url = write_located_run(tmp_path / "run", its)
    content = calibrated(url, tmp_path)
    assert (content["has_positions"], content["consensus"]) == (False, None)
    assert content["fused"] is not None
    assert "rerank.decision=consensus: none, no position of a photo is known" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run" / "index")
    assert calibrated(url, tmp_path) == content


def test_halves_are_blocks_of_neighbours() -> None:
    for number in (0, 1, 20, 747, 27_592):
        flags = held_out_queries(number)
        assert len(flags) == number
        assert abs(2 * int(flags.sum()) - number) <= max(1, number / NUM_BLOCKS)
        assert int((flags[1:] != flags[:-1]).sum()) == max(0, min(number, NUM_BLOCKS) - 1)


def test_one_round_has_nothing_to_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = write_run(tmp_path / "run", queries(), rerank={"batch_size": 16})
    assert calibrated(url, tmp_path)["stop_margin"] is None
    assert "no margin to stop at: one round scores all candidates" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rerank", "words"),
    [
        ({"stop_margin": 1.0}, "the run had rerank.adaptive=true; expected one that scored all pairs in both"),
        ({"second_direction": 5}, "the run had rerank.second_direction=5; expected one that scored all pairs in both"),
        ({"batch_size": None}, "not the settings of an evaluation"),
    ],
)
def test_runs_that_left_pairs_out(tmp_path: Path, rerank: dict[str, Any], words: str) -> None:
    url = write_run(tmp_path / "run", queries(), rerank=SETTINGS["rerank"] | rerank)
    assert words in mistake(url, tmp_path)


def test_too_few_queries_or_all_alike(tmp_path: Path) -> None:
    message = mistake(write_run(tmp_path / "few", queries(98)), tmp_path)
    assert f"predictions={tmp_path}/few: only 47 queries were answered in one half of the 98; expected 50" in message
    wrong = [ScoredQuery(query.scores, np.zeros_like(query.is_positive)) for query in queries()]
    assert "in the fitted half are wrong; expected both right and wrong" in mistake(
        write_run(tmp_path / "w", wrong), tmp_path
    )
    right = [ScoredQuery(query.scores, np.ones_like(query.is_positive)) for query in queries()]
    assert "in the fitted half are right; expected both right and wrong" in mistake(
        write_run(tmp_path / "r", right), tmp_path
    )


def test_what_is_no_finished_evaluation(tmp_path: Path) -> None:
    assert "expected the output directory of an evaluation" in mistake(f"{tmp_path}/none", tmp_path)
    storage.write_json(f"{tmp_path}/begun/settings.json", SETTINGS)
    assert "the run is not finished" in mistake(f"{tmp_path}/begun", tmp_path)
    assert "no ground truth" in mistake(write_run(tmp_path / "blind", queries(), ground_truth=False), tmp_path)
    url = write_run(tmp_path / "run", queries())
    (tmp_path / "run/settings.json").unlink()
    assert "not the settings of an evaluation" in mistake(url, tmp_path)


@pytest.mark.parametrize("damage", ["gone", "text", "other", "infinite", "distance", "id"])
def test_damaged_predictions(tmp_path: Path, damage: str) -> None:
    its = queries()
    url = write_run(tmp_path / "run", its)
    file = tmp_path / "run" / "predictions.parquet"
    if damage == "gone":
        file.unlink()
    elif damage == "text":
        file.write_text("x")
    elif damage == "other":
        write_run(tmp_path / "other", its[:-1])
        file.write_bytes((tmp_path / "other" / "predictions.parquet").read_bytes())
    elif damage == "infinite":
        its[0].scores[3] = -np.inf
        write_run(tmp_path / "run", its)
    else:
        located = drawn(160)
        url = write_located_run(tmp_path / "run", located)
        if damage == "distance":
            located[0].squared_distances[3] = np.nan
            write_located_run(tmp_path / "other", located)
        else:
            write_located_run(tmp_path / "other", [*located, *drawn(1)])
        file.write_bytes((tmp_path / "other" / "predictions.parquet").read_bytes())
    expected = "expected files of the same run" if damage == "other" else "the predictions of a run"
    assert expected in mistake(url, tmp_path)


def test_as_a_user_calls_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url, output = write_run(tmp_path / "run", queries()), f"{tmp_path}/calibration.json"
    monkeypatch.setattr(sys, "argv", ["calibrate", f"predictions={url}", f"output={output}"])
    assert run_job("calibrate") == 0
    assert capsys.readouterr().out.splitlines()[-1] == output
    assert read_calibration(output).benchmark == "made_up"
    monkeypatch.setattr(sys, "argv", ["calibrate", f"predictions={url}", f"output={tmp_path}"])
    assert run_job("calibrate") == 2
    assert (
        capsys.readouterr().err
        == f"error: output={tmp_path}: it is a directory; expected a file name (the calibration as JSON)\n"
    )


@pytest.mark.parametrize("loss", [-0.1, 101, float("nan")])
def test_a_loss_that_is_none(loss: float) -> None:
    with pytest.raises(UserError, match=r"^max_loss=.*: expected points of recall, 0 to 100"):
        load(CalibrateConfig, ["predictions=/p", "output=/o", f"max_loss={loss}"])
