"""The submission files of a challenge: a line for each query, keys by spaces."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pairvpr.data.manifest import Benchmark, Manifest
from pairvpr.evaluation.submission import KEYS_PER_QUERY, write_submission
from pairvpr.retrieval.pipeline import Answer


def answer(query_id: int, candidates: list[int], reranked: list[int]) -> Answer:
    no_scores = np.empty(0, np.float32)
    return Answer(query_id, np.array(candidates, np.int64), no_scores, np.array(reranked, np.int64), no_scores)


def test_lines_are_query_key_and_the_keys_of_the_best_answers(tmp_path: Path) -> None:
    benchmark = Benchmark(
        name="challenge",
        database=Manifest.of("/d", [f"miami/database/images/d-{number:02d}_x.jpg" for number in range(30)]),
        queries=Manifest.of("/q", ["miami/query/images/q.a.jpg", "miami/query/images/q_b.jpg", "oslo/q-c.jpg"]),
        positives=None,
        protocol={},
        has_submission=True,
    )
    found = [
        answer(0, [3, 1, 2], [2, 3]),
        answer(1, list(range(29, -1, -1)), list(range(25))),
        answer(2, [], []),  # its photo could not be read
    ]
    assert write_submission(str(tmp_path), benchmark, found) == ["submission_global.txt", "submission_reranked.txt"]
    by_descriptor = (tmp_path / "submission_global.txt").read_bytes().decode()
    reranked = (tmp_path / "submission_reranked.txt").read_bytes().decode()
    assert by_descriptor.splitlines() == [
        "q.a d-03_x d-01_x d-02_x",
        "q_b " + " ".join(f"d-{number:02d}_x" for number in range(29, 9, -1)),
        "q-c",
    ]
    assert reranked.splitlines() == [
        "q.a d-02_x d-03_x",
        "q_b " + " ".join(f"d-{number:02d}_x" for number in range(20)),
        "q-c",
    ]
    assert by_descriptor.endswith("q-c\n")
    assert len(reranked.splitlines()[1].split()) == 1 + KEYS_PER_QUERY == 21
    assert sorted(path.name for path in tmp_path.iterdir()) == ["submission_global.txt", "submission_reranked.txt"]
