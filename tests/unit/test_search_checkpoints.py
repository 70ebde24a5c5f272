"""The table of `search_checkpoints`, from results on disk: what is known of so many candidates, and which is best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pairvpr.config.schema import RerankConfig
from pairvpr.config.train_schema import SearchCheckpointsConfig
from pairvpr.data import sealed
from ray_jobs import search_checkpoints
from ray_jobs.search_checkpoints import COLUMNS, SEARCHED_N, Search

BEST_GLOBAL, BEST_RERANKED = "epoch_0001.pt", "epoch_0002.pt"
RECALLS = {
    "epoch_0000.pt": {"global": 10.0, "reranked": 20.0},
    BEST_GLOBAL: {"global": 40.0, "reranked": 30.0},
    BEST_RERANKED: {"global": 30.0, "reranked": 50.0},
}


def _search(output: Path, num_candidates: int) -> Search:
    """Results as each actor writes them, whatever the number of candidates."""
    for name, steps in RECALLS.items():
        recalls = {
            column: (steps[column.split("_")[0]] if num_candidates or "global" in column else 0.0) for column in COLUMNS
        }
        sealed.write_json(search_checkpoints._result_url(str(output), name), {"weights_sha256": "ab", **recalls})
    rerank = RerankConfig(num_candidates=num_candidates)
    config = SearchCheckpointsConfig(checkpoints="unused", output=str(output), rerank=rerank)
    no_benchmark: Any = None
    return Search(config=config, output=str(output), benchmark=no_benchmark, urls=dict.fromkeys(RECALLS, "unused"))


@pytest.mark.parametrize("num_candidates", [0, 1, 3, 5, 9, 10, 100])
def test_recalls_of_more_answers_than_are_scored_are_not_known(tmp_path: Path, num_candidates: int) -> None:
    table = search_checkpoints._table(_search(tmp_path, num_candidates), {})
    for row in table.to_pylist():
        its = RECALLS[row["checkpoint"]]
        for n in SEARCHED_N:
            assert row[f"global_recall@{n}"] == its["global"]
            assert row[f"reranked_recall@{n}"] == (its["reranked"] if n <= num_candidates else None)


@pytest.mark.parametrize(
    ("num_candidates", "best"),
    [
        (0, f"best: {BEST_GLOBAL}, recall@1 40.0 global, nothing re-ranked"),
        (3, f"best: {BEST_RERANKED}, recall@1 50.0 re-ranked"),
    ],
)
def test_the_best_is_by_what_is_known(tmp_path: Path, num_candidates: int, best: str) -> None:
    table = search_checkpoints._table(_search(tmp_path, num_candidates), {})
    *lines, last = search_checkpoints._text(table).splitlines()
    assert last == best
    assert lines[1].split()[1:] == ["10.0"] * 3 + (["-"] * 3 if num_candidates == 0 else ["20.0", "-", "-"])
    failed = search_checkpoints._table(_search(tmp_path, num_candidates), {best.split()[1].rstrip(","): "it broke"})
    assert best.split()[1] not in search_checkpoints._text(failed).splitlines()[-1]
