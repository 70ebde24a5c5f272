"""What a run writes: predictions.parquet and metrics.json as the architecture's page has them."""

from __future__ import annotations

import json
import math
import platform
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pairvpr.config.schema import DecisionRule
from pairvpr.data.manifest import Benchmark, Manifest
from pairvpr.evaluation.confidence import Judge
from pairvpr.evaluation.predictions import predictions_table, write_predictions
from pairvpr.evaluation.report import RunFacts, metrics, summary
from pairvpr.retrieval.decision import Decided
from pairvpr.retrieval.pipeline import Answer
from tests.support.small import small_model_config

FACTS = RunFacts(
    index={"kind": "flat"},
    weights_sha256="ab" * 32,
    untrained=True,
    num_candidates=5,
    seconds_describe=8.0,
    seconds_retrieve=0.4,
    seconds_rerank=20.0,
    num_rejected_database=1,
    num_rejected_queries=1,
)
POSITIVES = [[7], [11, 3], [], [0]]
# Query 0: its positive is first after re-ranking, sixth before. 1: second, then fourth. 2: no positive. 3: broken.
CANDIDATES = [[1, 2, 3, 4, 5, 7, 8, 9, 10, 11], [0, 11, 2, 4, 5, 6, 7, 8, 9, 10], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], []]
RERANKED = [[5, 4, 3, 2, 1], [5, 4, 2, 11, 0], [4, 3, 2, 1, 0], []]


def answers() -> list[Answer]:
    return [
        Answer(
            query_id,
            np.array(candidates, np.int64),
            np.linspace(0.25, 1, len(candidates), dtype=np.float32),
            np.array(reranked, np.int64),
            np.linspace(3, -1, len(reranked), dtype=np.float32),
        )
        for query_id, (candidates, reranked) in enumerate(zip(CANDIDATES, RERANKED, strict=True))
    ]


def benchmark(*, ground_truth: bool = True) -> Benchmark:
    return Benchmark(
        name="made_up",
        database=Manifest.of("/d", [f"{number:02d}.jpg" for number in range(12)]),
        queries=Manifest.of("/q", ["a.jpg", "b.jpg", "ç.jpg", "d.jpg"]),
        positives=[np.array(ids, np.int64) for ids in POSITIVES] if ground_truth else None,
        protocol={"positives": "radius" if ground_truth else "none", "radius_m": 25.0 if ground_truth else None},
    )


def test_predictions_have_the_columns_of_the_architecture(tmp_path: Path) -> None:
    write_predictions(str(tmp_path / "predictions.parquet"), predictions_table(benchmark(), answers()))
    table = pq.read_table(tmp_path / "predictions.parquet")
    ids, numbers = pa.list_(pa.int64()), pa.list_(pa.float32())
    assert [(field.name, field.type) for field in table.schema] == [
        ("query_id", pa.int64()),
        ("query_path", pa.string()),
        ("candidates", ids),
        ("squared_distances", numbers),
        ("reranked", ids),
        ("pair_scores", numbers),
        ("positives", ids),
        ("confidence", pa.float32()),
        ("in_map", pa.bool_()),
    ]
    assert table.column("query_id").to_pylist() == [0, 1, 2, 3]
    assert table.column("query_path").to_pylist() == ["a.jpg", "b.jpg", "ç.jpg", "d.jpg"]
    assert table.column("candidates").to_pylist() == CANDIDATES
    assert table.column("reranked").to_pylist() == RERANKED
    assert table.column("positives").to_pylist() == POSITIVES
    assert table.column("squared_distances").to_pylist()[0][0] == 0.25
    assert table.column("pair_scores").to_pylist()[1] == [3, 2, 1, 0, -1]
    assert table.slice(3).to_pylist()[0] == {
        "query_id": 3,
        "query_path": "d.jpg",
        "candidates": [],
        "squared_distances": [],
        "reranked": [],
        "pair_scores": [],
        "positives": [0],
        "confidence": None,
        "in_map": None,
    }


def test_predictions_of_a_judge() -> None:
    """Best scores 3, 3, 3 and none; the midpoint is 3, then 2."""
    table = predictions_table(benchmark(), answers(), Judge(1.0, 3.0))
    assert table.column("confidence").to_pylist() == [0.5, 0.5, 0.5, None]
    assert table.column("in_map").to_pylist() == [None] * 4
    judged = answers()
    judged[1].pair_scores[:] = judged[1].pair_scores - 4
    table = predictions_table(benchmark(), judged, Judge(1.0, 2.0, not_in_map_below=0.5))
    confidence = [1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(1.5)), 1 / (1 + math.exp(-0.5))]
    assert table.column("confidence").to_pylist() == [*(pytest.approx(value) for value in confidence), None]
    assert table.column("in_map").to_pylist() == [True, False, True, None]


def test_confidence_counted_by_hand() -> None:
    """Right, wrong, wrong and without a positive, unreadable; confidence 0.85, 0.25, 0.85."""
    judged = answers()
    for answer, score in zip(judged[:3], (math.log(0.85 / 0.15), -math.log(3), math.log(0.85 / 0.15)), strict=True):
        answer.pair_scores[0] = 2 * score
    judged[0].reranked[0] = 7
    facts = replace(FACTS, judge=Judge(1.0, not_in_map_below=0.5))
    content = json.loads(json.dumps(metrics(benchmark(), judged, small_model_config(), facts), allow_nan=False))
    found = content["confidence"]
    assert found["expected_calibration_error"] == pytest.approx((2 * abs(0.85 - 0.5) + 0.25) / 3)
    assert [row["count"] for row in found["reliability"]] == [0, 0, 1, 0, 0, 0, 0, 0, 2, 0]
    assert (found["num_answered"], found["num_in_map"], found["recall_at_1_of_in_map"]) == (3, 2, 50.0)
    assert (found["refused_without_positives"], found["refused_with_positives"]) == (0.0, 50.0)
    text = summary(content)
    assert "2 of 3 queries answered, of them right 50.0 %, refused of queries without a positive 0.0 %" in text
    assert "expected calibration error 0.317 at temperature 1.000, midpoint 0.000" in text


def test_confidence_without_ground_truth_and_without_the_question() -> None:
    facts = replace(FACTS, judge=Judge(1.0))
    found = metrics(benchmark(ground_truth=False), answers(), small_model_config(), facts)["confidence"]
    assert found["num_answered"] == 3
    assert {key for key, value in found.items() if value is not None} == {"temperature", "midpoint", "num_answered"}
    assert metrics(benchmark(), answers(), small_model_config(), FACTS)["confidence"] is None
    nothing = [
        replace(answer, reranked=answer.reranked[:0], pair_scores=answer.pair_scores[:0]) for answer in answers()
    ]
    facts = replace(FACTS, judge=Judge(1.0, not_in_map_below=0.5))
    content = metrics(benchmark(), nothing, small_model_config(), facts)
    json.dumps(content, allow_nan=False)
    assert (content["confidence"]["num_in_map"], content["confidence"]["recall_at_1_of_in_map"]) == (0, None)
    assert "0 of 0 queries answered" in summary(content)


def test_how_many_candidates_were_scored() -> None:
    assert metrics(benchmark(), answers(), small_model_config(), FACTS)["scored_per_query"] is None
    stopped = answers()
    stopped[0].pair_scores[2:] = -np.inf
    content = metrics(benchmark(), stopped, small_model_config(), FACTS)
    assert content["scored_per_query"] == pytest.approx((2 + 5 + 5) / 3)
    assert "candidates scored   4.0 a query" in summary(content)


def test_without_ground_truth_positives_are_null(tmp_path: Path) -> None:
    write_predictions(str(tmp_path / "p.parquet"), predictions_table(benchmark(ground_truth=False), answers()))
    table = pq.read_table(tmp_path / "p.parquet")
    assert table.column("positives").to_pylist() == [None] * 4
    assert table.schema.field("positives").type == pa.list_(pa.int64())


def test_equal_tables_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_predictions(str(tmp_path / name), predictions_table(benchmark(), answers()))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    other = answers()
    other[0].pair_scores[0] += 1e-6
    write_predictions(str(tmp_path / "two"), predictions_table(benchmark(), other))
    assert (tmp_path / "one").read_bytes() != (tmp_path / "two").read_bytes()


def test_metrics_have_the_keys_of_the_architecture_and_numbers_counted_by_hand() -> None:
    content = json.loads(json.dumps(metrics(benchmark(), answers(), small_model_config(), FACTS), allow_nan=False))
    architecture = {
        "benchmark",
        "protocol",
        "model",
        "recall",
        "candidate_ceiling",
        "seconds_per_query",
        "kib_per_image",
        "rejected_images",
        "versions",
    }
    assert architecture <= set(content)
    assert content["benchmark"] == "made_up"
    assert content["recall"] == {"global": {"1": 0.0, "5": 25.0, "10": 50.0}, "reranked": {"1": 0.0, "5": 25.0}}
    with_positives = content["recall_of_queries_with_positives"]
    assert with_positives["global"] == pytest.approx({"1": 0, "5": 100 / 3, "10": 200 / 3})
    assert with_positives["reranked"] == pytest.approx({"1": 0, "5": 100 / 3})
    assert content["candidate_ceiling"] == 25.0
    assert content["num_candidates"] == 5
    assert content["seconds_per_query"] == pytest.approx({"describe": 2, "retrieve": 0.1, "rerank": 5})
    assert content["kib_per_image"] == {"descriptor": 16 * 4 / 1024, "dense": 4 * 32 * 4 / 1024}
    assert content["rejected_images"] == {"database": 1, "queries": 1}


def test_metrics_name_the_test_and_the_model() -> None:
    content = metrics(benchmark(), answers(), small_model_config(), FACTS)
    protocol, model = content["protocol"], content["model"]
    counts = ("num_queries", "num_queries_with_positives", "num_queries_without_positives", "num_database")
    assert [protocol[name] for name in counts] == [4, 3, 1, 12]
    assert (protocol["positives"], protocol["radius_m"]) == ("radius", 25.0)
    assert protocol["database_paths_sha256"] == benchmark().database.paths_sha256
    assert protocol["queries_paths_sha256"] == benchmark().queries.paths_sha256
    assert "miss" in protocol["queries_without_positives"]
    assert model == {"name": "small", "weights_sha256": "ab" * 32, "untrained": True, "precision": "fp32"}
    scaled = metrics(benchmark(), answers(), replace(small_model_config(), scaled_decoding=True), FACTS)
    assert scaled["model"] == model | {"scaled_decoding": True}
    assert content["versions"]["python"] == platform.python_version()
    assert {"pairvpr", "torch", "ray", "numpy"} <= set(content["versions"])


def test_more_candidates_than_there_are() -> None:
    """K = 500 of 12 photos: N is reported up to K, and whoever is not found stays a miss."""
    facts = replace(FACTS, num_candidates=500)
    content = metrics(benchmark(), answers(), small_model_config(), facts)
    assert list(content["recall"]["global"]) == ["1", "5", "10"]
    assert list(content["recall"]["reranked"]) == ["1", "5", "10", "15", "20", "50", "100", "250", "500"]
    assert content["recall"]["reranked"]["500"] == 25.0
    assert content["candidate_ceiling"] == 50.0
    assert re.search(r"\bnan\b", summary(content)) is None


def test_without_ground_truth_there_is_no_recall() -> None:
    content = metrics(benchmark(ground_truth=False), answers(), small_model_config(), FACTS)
    assert content["recall"] is content["recall_of_queries_with_positives"] is content["candidate_ceiling"] is None
    assert "no ground truth: predictions without recall" in summary(content)
    json.dumps(content, allow_nan=False)


def test_when_no_query_has_a_positive() -> None:
    empty = benchmark()
    assert empty.positives is not None
    empty.positives[:] = [np.empty(0, np.int64)] * 4
    content = metrics(empty, answers(), small_model_config(), FACTS)
    assert content["recall"]["global"]["1"] == 0.0
    assert content["recall_of_queries_with_positives"] is None
    json.dumps(content, allow_nan=False)


def test_when_no_query_can_be_read() -> None:
    nothing = np.empty(0, np.int64), np.empty(0, np.float32)
    broken = [Answer(query_id, *nothing, *nothing) for query_id in range(4)]
    content = metrics(benchmark(), broken, small_model_config(), FACTS)
    assert content["candidate_ceiling"] == 0.0
    assert set(content["recall"]["reranked"].values()) == {0.0}
    assert all(not math.isnan(value) for value in content["recall"]["reranked"].values())
    assert isinstance(summary(content), str)


def test_the_summary_says_what_a_benchmark_drops() -> None:
    rule: dict[str, object] = {"queries_without_positives": "dropped", "num_queries_dropped": 7}
    text = summary(metrics(replace(benchmark(), protocol=rule), answers(), small_model_config(), FACTS))
    assert "7 further queries without a positive are dropped" in text
    assert "dropped" not in summary(metrics(benchmark(), answers(), small_model_config(), FACTS))


def test_the_summary_shows_the_numbers() -> None:
    text = summary(metrics(benchmark(), answers(), small_model_config(), FACTS))
    lines = text.splitlines()
    table = {line[:20].strip(): line[20:].split() for line in lines if line[:20].strip() and len(line) > 20}
    assert table["recall@N (%)"] == ["1", "5", "10"]
    assert table["global descriptor"] == ["0.0", "25.0", "50.0"]
    assert table["re-ranked, K = 5"] == ["0.0", "25.0", "-"]
    for part in (
        "made_up: 4 queries, 12 database photos, model small (fp32, weights abababababab)",
        "UNTRAINED",
        "candidate ceiling: 25.0 %",
        "1 queries without a positive count as misses",
        "describe 2.0000   retrieve 0.1000   re-rank 5.0000",
        "database 1   queries 1",
    ):
        assert part in text


def decided_answers() -> list[Answer]:
    """Query 0: the decision keeps the order. 1: it puts 11, a positive, first. 2: it reverses. 3: nothing."""
    orders = ([5, 4, 3, 2, 1], [11, 5, 4, 2, 0], [0, 1, 2, 3, 4], [])
    return [
        replace(
            answer,
            decided=Decided(
                np.array(order, np.int64),
                np.linspace(2, -2, len(order), dtype=np.float32),
                1.5 - answer.query_id if order else math.nan,
                (10.0 * answer.query_id, 5.0) if order else (math.nan, math.nan),
                2.5 if order else math.nan,
            ),
        )
        for answer, order in zip(answers(), orders, strict=True)
    ]


def test_a_decision_stands_beside_the_published_order() -> None:
    judge = Judge(0.5, 0.0, not_in_map_below=0.7)
    table = predictions_table(benchmark(), decided_answers(), judge)
    plain = predictions_table(benchmark(), answers(), judge)
    names = ["decided", "evidence", "estimated_east_m", "estimated_north_m", "estimated_spread_m"]
    assert table.column_names == [*plain.column_names, *names]
    for name in ("candidates", "squared_distances", "reranked", "pair_scores", "positives"):
        assert table.column(name).equals(plain.column(name))
    rows = table.to_pylist()
    assert [row["decided"] for row in rows] == [[5, 4, 3, 2, 1], [11, 5, 4, 2, 0], [0, 1, 2, 3, 4], []]
    assert [row["estimated_east_m"] for row in rows] == [0.0, 10.0, 20.0, None]
    assert [row["estimated_spread_m"] for row in rows] == [2.5, 2.5, 2.5, None]
    wanted = [1 / (1 + math.exp(-odds)) for odds in (1.5, 0.5, -0.5)]
    assert [row["confidence"] for row in rows] == [*(pytest.approx(its, rel=1e-6) for its in wanted), None]
    assert [row["in_map"] for row in rows] == [True, False, False, None]


def test_metrics_of_a_decision() -> None:
    made = benchmark()
    photos_m = np.stack([np.arange(12) * 10.0, np.zeros(12)], axis=1).astype(np.float64)
    queries_m = np.array([[50.0, 4.0], [110.0, 30.0], [np.nan, 0.0], [0.0, 0.0]])
    made = replace(
        made, database=made.database.with_positions(photos_m), queries=made.queries.with_positions(queries_m)
    )
    facts = replace(FACTS, decision=DecisionRule.fused)
    content = metrics(made, decided_answers(), small_model_config(), facts)
    assert content["recall"] == metrics(made, answers(), small_model_config(), FACTS)["recall"]
    assert "decision" not in metrics(made, answers(), small_model_config(), FACTS)
    found = content["decision"]
    assert found["recall"] == {"1": 25.0, "5": 25.0}
    assert (found["corrected"], found["broken"], found["rule"]) == (1, 0, "fused")
    # Photo 5 is 4 m from query 0, photo 11 is 30 m from query 1; query 2 has no position, query 3 no answer.
    decided = found["error_m"]["decided"]
    assert (decided["num_queries"], decided["median_m"]) == (3, 30.0)
    assert [decided[f"within_{radius}_m"] for radius in (5, 25, 100)] == pytest.approx([100 / 3, 100 / 3, 200 / 3])
    assert found["error_m"]["reranked"]["median_m"] == pytest.approx(math.hypot(60, 30))
    assert found["error_m"]["estimated"]["median_m"] == pytest.approx(math.hypot(100, 25))
    text = summary(content)
    assert "decided, fused" in text
    assert "fused decision: 1 queries corrected, 0 broken" in text
    without = metrics(benchmark(ground_truth=False), decided_answers(), small_model_config(), facts)["decision"]
    assert without["recall"] is None
    assert set(without["error_m"].values()) == {None}
