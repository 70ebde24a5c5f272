"""The audit at K' is what a run with K' candidates reports; its counts are those made by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pairvpr.config.compose import load, load_evaluations
from pairvpr.config.train_schema import SearchCheckpointsConfig
from pairvpr.data.benchmarks import load_benchmark, prepare_benchmark
from pairvpr.data.manifest import Benchmark, Manifest
from pairvpr.errors import UserError
from pairvpr.evaluation.audit import audit, audit_table, audited_candidates
from pairvpr.evaluation.report import RunFacts, metrics, summary
from pairvpr.retrieval import pipeline
from pairvpr.retrieval.pipeline import Answer
from tests.support.small import SMALL_CITY, shaken_model, small_evaluate_config, small_model_config

pytestmark = pytest.mark.slow

FACTS = RunFacts(
    index={"kind": "flat"},
    weights_sha256="ab" * 32,
    untrained=False,
    num_candidates=4,
    seconds_describe=0.0,
    seconds_retrieve=0.0,
    seconds_rerank=0.0,
    num_rejected_database=0,
    num_rejected_queries=0,
)
# candidates, re-ranked of 4 (with what score), positives, group
QUERIES = [
    ([0, 1, 2, 3, 4], {3: 5.0, 1: 2.0, 0: 1.0, 2: 0.0}, [3], "oslo"),  # right from K' = 4 on, before wrong
    ([5, 6, 7, 8, 9], {7: 2.0, 5: 1.0, 6: 0.0, 8: 0.0}, [5, 9], "oslo"),  # broken from K' = 3 on
    ([0, 1, 2, 3, 4], {1: 3.0, 2: 3.0, 0: 2.0, 3: 1.0}, [1], "rome"),  # corrected from K' = 2 on
    ([4, 3, 2, 1, 0], {1: 9.0, 2: 8.0, 3: 7.0, 4: 6.0}, [], "rome"),  # no positive: a miss
    ([], {}, [2], "rome"),  # can't be read: a miss
]


def benchmark(*, groups: bool = True, ground_truth: bool = True) -> Benchmark:
    return Benchmark(
        name="made_up",
        database=Manifest.of("/d", [f"{number}.jpg" for number in range(10)]),
        queries=Manifest.of("/q", [f"{number}.jpg" for number in range(len(QUERIES))]),
        positives=[np.array(row[2], np.int64) for row in QUERIES] if ground_truth else None,
        protocol={"positives": "radius", "radius_m": 25.0},
        query_groups=[row[3] for row in QUERIES] if groups else None,
    )


def answers() -> list[Answer]:
    return [
        Answer(
            query_id,
            np.array(candidates, np.int64),
            np.linspace(0, 1, len(candidates), dtype=np.float32),
            np.array(list(scores), np.int64),
            np.array(list(scores.values()), np.float32),
        )
        for query_id, (candidates, scores, _, _) in enumerate(QUERIES)
    ]


def test_counted_by_hand() -> None:
    content = audit(benchmark(), answers(), [1, 2, 3, 4])
    assert content is not None
    assert (content["num_queries"], content["global_recall_at_1"]) == (5, 20.0)
    assert content["by_num_candidates"] == {
        "1": {"reranked": {"1": 20.0}, "candidate_ceiling": 20.0, "corrected": 0, "broken": 0},
        "2": {"reranked": {"1": 40.0}, "candidate_ceiling": 40.0, "corrected": 1, "broken": 0},
        "3": {"reranked": {"1": 20.0}, "candidate_ceiling": 40.0, "corrected": 1, "broken": 1},
        "4": {"reranked": {"1": 40.0}, "candidate_ceiling": 60.0, "corrected": 2, "broken": 1},
    }
    oslo, rome = content["by_group"]["oslo"], content["by_group"]["rome"]
    assert list(content["by_group"]) == ["oslo", "rome"]
    assert (oslo["num_queries"], oslo["global_recall_at_1"]) == (2, 50.0)
    assert (rome["num_queries"], rome["global_recall_at_1"]) == (3, 0.0)
    row = {"reranked": {"1": 50.0}, "candidate_ceiling": 100.0, "corrected": 1, "broken": 1}
    assert oslo["by_num_candidates"]["4"] == row
    row = {"reranked": {"1": pytest.approx(100 / 3)}, "candidate_ceiling": pytest.approx(100 / 3)}
    assert rome["by_num_candidates"]["4"] == row | {"corrected": 1, "broken": 0}


def test_without_groups_and_without_ground_truth() -> None:
    content = audit(benchmark(groups=False), answers(), [4])
    assert content is not None
    assert content["by_group"] is None
    assert audit(benchmark(ground_truth=False), answers(), [4]) is None


@pytest.fixture(scope="module")
def city(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Benchmark]:
    """Six places; a query is broken; torch gets its threads back."""
    before = torch.get_num_threads()
    output = str(tmp_path_factory.mktemp("city"))
    config = replace(SMALL_CITY, queries_per_place=3)
    prepare_benchmark(config, output)
    benchmark = load_benchmark(config, output)
    Path(benchmark.queries.url(2)).write_text("not a photo")
    yield benchmark
    torch.set_num_threads(before)


def test_equals_a_run_with_so_many_candidates(city: Benchmark) -> None:
    """Batches of 3 pairs: 3, 6 and 12 cut them as 12 does, 5 and 7 do not, which may move the last bits."""
    model, numbers = shaken_model(), [1, 3, 5, 6, 7, 12]
    content = audit(
        city, pipeline.run(city, model, small_evaluate_config("unused", num_candidates=12, num_retrieved=15)), numbers
    )
    assert content is not None
    changes = set()
    for number in numbers:
        alone = pipeline.run(city, model, small_evaluate_config("unused", num_candidates=number, num_retrieved=15))
        report = metrics(city, alone, small_model_config(), replace(FACTS, num_candidates=number))
        row = content["by_num_candidates"][str(number)]
        assert row["reranked"] == report["recall"]["reranked"]
        assert row["candidate_ceiling"] == report["candidate_ceiling"]
        assert content["global_recall_at_1"] == report["recall"]["global"]["1"]
        positives = [set(ids.tolist()) for ids in city.positives or []]
        before, after = (
            [bool(set(ids[:1].tolist()) & there) for ids, there in zip(ranked, positives, strict=True)]
            for ranked in ([answer.candidates for answer in alone], [answer.reranked for answer in alone])
        )
        assert row["corrected"] == sum(right and not was for was, right in zip(before, after, strict=True))
        assert row["broken"] == sum(was and not right for was, right in zip(before, after, strict=True))
        changes.add((row["corrected"], row["broken"]))
    assert len(changes) > 2  # or nothing was tested
    assert any(corrected for corrected, _ in changes)
    assert any(broken for _, broken in changes)


@pytest.mark.parametrize(
    ("asked", "num_candidates", "audited"),
    [
        (None, 100, [10, 20, 50, 100]),
        (None, 120, [10, 20, 50, 100, 120]),
        (None, 5, [5]),
        (None, 10, [10]),
        (None, 1500, [10, 20, 50, 100, 200, 500, 1000, 1500]),
        ([3, 7], 100, [3, 7]),
        ([10, 200, 500], 180, [10, 180]),
    ],
)
def test_which_numbers_are_audited(asked: list[int] | None, num_candidates: int, audited: list[int]) -> None:
    assert audited_candidates(asked, num_candidates) == audited


def test_the_report_holds_it_and_shows_it() -> None:
    facts = replace(FACTS, report_candidates=[2, 4])
    content = json.loads(json.dumps(metrics(benchmark(), answers(), small_model_config(), facts), allow_nan=False))
    assert content["audit"] == audit(benchmark(), answers(), [2, 4])
    lines = summary(content).splitlines()
    assert "4 candidates                   40.0          -          -      60.0          2        1" in lines
    assert "by group, K = 4           queries   global@1   recall@1   ceiling  corrected   broken" in lines
    assert "oslo                            2       50.0       50.0     100.0          1        1" in lines
    assert "rome                            3        0.0       33.3      33.3          1        0" in lines


def test_groups_of_nothing_are_none() -> None:
    whole = benchmark()
    nothing = replace(whole, queries=whole.queries.take(np.empty(0, np.int64)), positives=[], query_groups=[])
    assert nothing.groupings == {"group": {}}


def test_queries_of_several_groups_count_in_each() -> None:
    """A group's entry is that of a benchmark of its queries alone."""
    subtasks = {"d2n": np.array([0, 2]), "o2n": np.array([0, 1, 4])}
    content = audit(replace(benchmark(), query_subtasks=subtasks), answers(), [2, 4])
    assert content is not None
    for name, ids in subtasks.items():
        whole = benchmark()
        assert whole.positives is not None
        alone = replace(
            whole, queries=whole.queries.take(ids), positives=[whole.positives[i] for i in ids], query_groups=None
        )
        expected = audit(alone, [answers()[i] for i in ids], [2, 4])
        assert expected is not None
        assert content["by_subtask"][name] == {key: its for key, its in expected.items() if key != "by_group"}


def test_a_long_name_of_a_group_moves_its_whole_column() -> None:
    groups = ["x" * 40, *["y"] * 4]
    content = audit(replace(benchmark(), query_groups=groups), answers(), [4])
    assert content is not None
    heading, *rows = audit_table(content)[-3:]
    assert {len(row) for row in rows} == {len(heading)}


def mistake(**settings: Any) -> str:
    line = [f"rerank.{key}={value}" for key, value in settings.items()]
    with pytest.raises(UserError) as caught:
        load_evaluations(["benchmark=toy_city", "output=/out", *line])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("numbers", ["[10,200]", "[0,10]", "[-1]", "[20,10]", "[10,10]", "[]"])
def test_numbers_that_can_not_be_audited(numbers: str) -> None:
    message = mistake(report_candidates=numbers, num_candidates=100)
    assert f"rerank.report_candidates={numbers.replace(',', ', ')}: expected" in message
    assert "from 1 to rerank.num_candidates=100" in message


def test_what_is_no_list_of_numbers() -> None:
    assert "rerank.report_candidates" in mistake(report_candidates="[a]")
    assert "rerank.report_candidates" in mistake(report_candidates="10")


def test_a_search_of_checkpoints_audits_nothing() -> None:
    line = ["checkpoints=/c", "output=/o", "benchmark=toy_city", "rerank.report_candidates=[10]"]
    with pytest.raises(UserError, match=r"^rerank\.report_candidates=\[10\]: checkpoints are not audited"):
        load(SearchCheckpointsConfig, line)
