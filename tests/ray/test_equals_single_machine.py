"""However the work is cut and shared out, the predictions are those of one machine without Ray, byte for byte."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pairvpr.config.compose import load, load_evaluations
from pairvpr.config.schema import BuildIndexConfig, QueryConfig
from pairvpr.data import sealed, storage
from pairvpr.distributed.parts import Parts
from pairvpr.errors import UserError
from pairvpr.evaluation.confidence import Calibration
from pairvpr.index.generations import read_manifest
from pairvpr.retrieval.decision import Decision, Votes, Weights
from pairvpr.retrieval.early_stop import stopped_after
from pairvpr.toy import city as toy_city
from ray_jobs.build_index import build_index
from ray_jobs.evaluate import evaluate, prepare
from ray_jobs.query import query
from tests.support.runs import (
    ONE_THREAD,
    SMALL_NETWORK,
    arguments,
    draw_city,
    single_machine_predictions,
    unpack_before_seals,
)

pytestmark = pytest.mark.usefixtures("local_ray")


Runs = Callable[[int, int], tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def runs(city: Path, local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Gives the output and the report of a run with so many shards and actors."""

    @cache
    def run(num_shards: int, num_actors: int) -> tuple[Path, dict[str, Any]]:
        output = tmp_path_factory.mktemp("run") / "out"
        line = arguments(
            city,
            output,
            f"index.num_shards={num_shards}",
            f"index.num_actors={num_actors}",
            f"describe.num_actors={num_actors}",
            f"rerank.num_actors={num_actors}",
            f"rerank.cache_gib={0 if num_actors == 3 else 0.5}",
        )
        (content,) = evaluate(load_evaluations(line))
        return output, content

    return run


@pytest.mark.parametrize(("num_shards", "num_actors"), [pytest.param(1, 1, marks=pytest.mark.soak), (5, 3)])
def test_shards_and_actors(runs: Runs, expected: bytes, num_shards: int, num_actors: int) -> None:
    output, content = runs(num_shards, num_actors)
    assert (output / "predictions.parquet").read_bytes() == expected
    assert content == sealed.read_json(str(output / "metrics.json"), "")
    assert content["rejected_images"] == {"database": 1, "queries": 1}
    manifest = read_manifest(str(output / "index"))
    assert manifest is not None
    assert len(manifest.shards) == num_shards
    assert sum(shard.count for shard in manifest.shards) == manifest.num_images
    assert not (output / "index" / "parts").exists()


def test_parts_of_several_batches_and_two_threads(city: Path, tmp_path: Path) -> None:
    draw_city(tmp_path, num_places=30)
    threads = [f"{step}.num_threads_per_actor=2" for step in ("describe", "index", "rerank")]
    line = arguments(tmp_path, tmp_path / "out", f"benchmark.queries={city}/queries", "describe.batch_size=2", *threads)
    line += ["rerank.num_candidates=2", "index.num_shards=2"]
    expected = single_machine_predictions(line, tmp_path / "expected.parquet")
    (config,) = load_evaluations(line)
    num_photos = len(list((tmp_path / "database").iterdir()))
    parts = Parts.of("unused", num_photos, config.describe.batch_size, config.model.image_size_px)
    assert parts.photos_per_part >= 2 * config.describe.batch_size
    evaluate([config])
    assert (tmp_path / "out" / "predictions.parquet").read_bytes() == expected


def test_stopping_early_and_confidence(city: Path, expected: bytes, tmp_path: Path) -> None:
    """About half of the queries stop after their first round of 4 of 10; a plain loop over the full run says which."""
    (tmp_path / "full.parquet").write_bytes(expected)
    full = []
    for row in pq.read_table(tmp_path / "full.parquet").to_pylist():
        score_of = dict(zip(row["reranked"], row["pair_scores"], strict=True))
        full.append(np.array([score_of[image_id] for image_id in row["candidates"][: len(score_of)]], np.float32))
    best = sorted(float(scores[:4].max()) for scores in full if len(scores))
    stop_margin = (best[len(best) // 2 - 1] + best[len(best) // 2]) / 2
    (plain,) = prepare(load_evaluations(arguments(city, tmp_path / "out")))
    calibration = Calibration(
        benchmark="made_up",
        num_queries=50,
        num_candidates=10,
        model=plain.index_settings()["model"],
        temperature=0.5,
        midpoint=stop_margin,
        round_size=4,
        stop_margin=stop_margin,
    )
    storage.write_json(f"{tmp_path}/calibration.json", calibration.content())
    its = (f"calibration={tmp_path}/calibration.json", "adaptive=true", "not_in_map_below=0.5")
    line = arguments(city, tmp_path / "out", *(f"rerank.{setting}" for setting in its))
    single = single_machine_predictions(line, tmp_path / "expected.parquet")
    (content,) = evaluate(load_evaluations(line))
    assert (tmp_path / "out" / "predictions.parquet").read_bytes() == single

    rows = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pylist()
    scored = [int(np.isfinite(row["pair_scores"]).sum()) for row in rows]
    assert scored == [stopped_after(scores, 4, stop_margin) for scores in full]
    assert {4, 10} <= set(scored)
    assert content["scored_per_query"] == np.mean([number for number in scored if number])
    for row, number in zip(rows, scored, strict=True):
        assert row["reranked"][number:] == row["candidates"][number : len(row["reranked"])]
        assert row["in_map"] == (row["pair_scores"][0] >= stop_margin if number else None)
    assert content["confidence"]["num_in_map"] == sum(row["in_map"] is True for row in rows)


@pytest.mark.parametrize(
    ("rule", "option"),
    [
        ("consensus", "adaptive=true"),
        pytest.param("fused", "second_direction=3", marks=pytest.mark.soak),
        pytest.param("consensus", "report_candidates=null", marks=pytest.mark.soak),
    ],
)
def test_decisions(city: Path, expected: bytes, tmp_path: Path, rule: str, option: str) -> None:
    """Ids, evidence, confidence and estimated positions; what is scored follows the evidence, not the pair score."""
    (tmp_path / "full.parquet").write_bytes(expected)
    weights = Weights(pair_score=0.5, squared_distance=20.0, log_rank=0.25)
    firsts = []
    for row in pq.read_table(tmp_path / "full.parquet").to_pylist():
        score_of = dict(zip(row["reranked"], row["pair_scores"], strict=True))
        scores = np.array(
            [score_of[image_id] for image_id in row["candidates"][:4] if image_id in score_of], np.float32
        )
        if len(scores) == 4:
            prior = weights.prior(np.array(row["squared_distances"][:4], np.float32))
            firsts.append(float(weights.evidence(scores, prior).max()))
    stop_margin = (sorted(firsts)[len(firsts) // 2 - 1] + sorted(firsts)[len(firsts) // 2]) / 2
    decision = Decision(
        weights=weights, votes=None, nothing=-9.0, temperature=0.7, midpoint=0.1, stop_margin=stop_margin
    )
    votes = Votes(radius_m=25.0, softness=0.5, own=0.8, weight=1.5)
    (plain,) = prepare(load_evaluations(arguments(city, tmp_path / "out")))
    calibration = Calibration(
        benchmark="made_up",
        num_queries=50,
        num_candidates=10,
        model=plain.index_settings()["model"],
        temperature=0.5,
        midpoint=0.0,
        round_size=4,
        stop_margin=None,
        has_positions=True,
        fused=decision,
        consensus=replace(decision, votes=votes),
    )
    storage.write_json(f"{tmp_path}/calibration.json", calibration.content())
    its = (f"calibration={tmp_path}/calibration.json", f"decision={rule}", "not_in_map_below=0.5", option)
    line = arguments(city, tmp_path / "out", *(f"rerank.{setting}" for setting in its))
    single = single_machine_predictions(line, tmp_path / "expected.parquet")
    (content,) = evaluate(load_evaluations(line))
    assert (tmp_path / "out" / "predictions.parquet").read_bytes() == single

    rows = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pylist()
    assert any(row["decided"][0] != row["reranked"][0] for row in rows if row["decided"])
    assert all(sorted(row["decided"]) == sorted(row["reranked"]) for row in rows)
    assert [row["estimated_east_m"] is None for row in rows] == [not row["decided"] for row in rows]
    first_right = [bool(row["decided"]) and row["decided"][0] in row["positives"] for row in rows]
    assert content["decision"]["recall"]["1"] == pytest.approx(100 * np.mean(first_right))
    assert content["decision"]["error_m"]["decided"]["within_25_m"] == pytest.approx(100 * np.mean(first_right))
    if option == "adaptive=true":
        scored = [int(np.isfinite(row["pair_scores"]).sum()) for row in rows if row["candidates"]]
        assert scored.count(4) == sum(first >= stop_margin for first in firsts)
        assert {4, 10} <= set(scored)


@pytest.mark.soak
def test_scaled_decoding(tmp_path: Path) -> None:
    """Photos large enough for it: described and re-ranked at a scale, here and there."""
    for part, photos in (
        ("database", toy_city.database_photos(seed=3, num_places=4, photos_per_place=2)),
        ("queries", toy_city.query_photos(seed=3, num_places=2)),
    ):
        (tmp_path / part).mkdir()
        for photo in photos:
            toy_city.draw(photo, width_px=320, height_px=240).save(tmp_path / part / photo.path, quality=85)
    line = arguments(tmp_path, tmp_path / "out", "model.scaled_decoding=true", "rerank.num_candidates=4")
    expected = single_machine_predictions(line, tmp_path / "expected.parquet")
    (content,) = evaluate(load_evaluations(line))
    assert (tmp_path / "out" / "predictions.parquet").read_bytes() == expected
    assert content["model"]["scaled_decoding"] is True
    (whole,) = load_evaluations([*line, "model.scaled_decoding=false"])
    with pytest.raises(UserError, match=r"model\.scaled_decoding True there, absent now"):
        evaluate([whole])


def test_ties_and_rejects_are_in_the_test_data(expected: bytes, tmp_path: Path) -> None:
    (tmp_path / "predictions.parquet").write_bytes(expected)
    rows = pq.read_table(tmp_path / "predictions.parquet").to_pylist()
    assert any(len(set(row["squared_distances"])) < len(row["squared_distances"]) for row in rows)
    unanswered = [row for row in rows if not row["candidates"]]
    assert [Path(row["query_path"]).name.endswith("@broken.jpg") for row in unanswered] == [True]
    assert unanswered[0]["reranked"] == []
    assert len(unanswered[0]["positives"]) > 0  # so it counts as a miss


def test_index_then_query(city: Path, expected: bytes, tmp_path: Path) -> None:
    """`build_index` and `query` alone give the candidates and scores of the whole job; no ground truth, no recall."""
    shared = [word for word in arguments(city, "unused") if word.split(".")[0] in ("model", "describe", "model=tiny")]
    index = build_index(
        load(BuildIndexConfig, [f"database={city}/database", f"output={tmp_path}/index", "index.num_shards=3", *shared])
    )
    rest = [word for word in arguments(city, "unused") if word.split(".")[0] in ("rerank", "index")]
    content = query(
        load(QueryConfig, [f"index.path={index}", f"queries={city}/queries", f"output={tmp_path}/out", *shared, *rest])
    )
    assert content["recall"] is None
    (tmp_path / "expected.parquet").write_bytes(expected)
    whole, alone = (pq.read_table(tmp_path / name) for name in ("expected.parquet", "out/predictions.parquet"))
    assert alone.drop(["positives"]).equals(whole.drop(["positives"]))
    assert alone.column("positives").null_count == alone.num_rows


@pytest.mark.soak
def test_several_benchmarks_share_one_run(city: Path, expected: bytes, tmp_path: Path) -> None:
    line = [word for word in arguments(city, tmp_path / "out") if word != "benchmark=folders"]
    line += ["benchmarks=[folders,toy_city]", "benchmark.num_places=4"]
    first, second = evaluate(load_evaluations(line))
    assert (first["benchmark"], second["benchmark"]) == ("folders", "toy_city")
    assert (tmp_path / "out" / "folders" / "predictions.parquet").read_bytes() == expected
    assert pq.read_table(tmp_path / "out" / "toy_city" / "predictions.parquet").num_rows == 4


def test_index_directory_is_readable_by_other_tools(runs: Runs) -> None:
    """The promises of docs/formats.md, read with numpy and pyarrow alone."""
    index = runs(5, 3)[0] / "index"
    images = pq.read_table(index / "images.parquet")
    rejected = pq.read_table(index / "rejected.parquet").to_pylist()
    assert images.column("image_id").to_pylist() == list(range(images.num_rows))
    assert images.column("path").to_pylist() == sorted(images.column("path").to_pylist())
    assert len(rejected) == 1
    assert rejected[0]["path"].endswith("@broken.jpg")
    assert rejected[0]["error"]
    ids = np.concatenate([np.load(index / f"shards/{shard:05d}/ids.npy") for shard in range(5)])
    rows = np.concatenate([np.load(index / f"shards/{shard:05d}/descriptors.npy") for shard in range(5)])
    held = [row for row, path in enumerate(images.column("path").to_pylist()) if path != rejected[0]["path"]]
    assert ids.tolist() == held
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


def test_a_run_that_an_earlier_version_finished_or_began_goes_on(tmp_path: Path) -> None:
    """Nothing is described, retrieved or scored again but the unit that is missing."""
    unpack_before_seals(tmp_path / "before")
    run = tmp_path / "before" / "run"
    shutil.rmtree(run / "dense")
    line = ["benchmark=toy_city", "benchmark.num_places=30", "benchmark.photos_per_place=2", "benchmark.seed=5"]
    line += ["benchmark.queries_per_place=1", f"output={run}", "rerank.num_candidates=4", "index.num_retrieved=10"]
    line += ["index.num_shards=2", "rerank.queries_per_unit=16", "describe.batch_size=8", *SMALL_NETWORK, *ONE_THREAD]
    line += ["rerank.dense_features=store"]
    before = pq.read_table(run / "predictions.parquet")
    kept = (run / "reranked" / "000000.parquet").read_bytes()
    (run / "reranked" / "000001.parquet").unlink()
    evaluate(load_evaluations(line))
    assert (run / "reranked" / "000000.parquet").read_bytes() == kept
    after = pq.read_table(run / "predictions.parquet")
    exact = ["query_id", "query_path", "candidates", "squared_distances", "positives"]
    assert after.select(exact).equals(before.select(exact))
    is_kept = np.isin(before["query_id"], pq.read_table(run / "reranked" / "000000.parquet")["query_id"])
    assert is_kept.sum() == 16
    answers = ["reranked", "pair_scores"]
    assert after.filter(is_kept).select(answers).equals(before.filter(is_kept).select(answers))
    earlier, later = (np.sort(np.concatenate(t.filter(~is_kept)["pair_scores"].to_pylist())) for t in (before, after))
    np.testing.assert_allclose(earlier, later, atol=0.05)  # by another CPU, of photos drawn by another Pillow
