"""Submission files for a challenge (MSLS): the photos found for each query."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from pairvpr.data import storage
from pairvpr.data.manifest import Benchmark
from pairvpr.evaluation.predictions import final_order
from pairvpr.retrieval.pipeline import Answer

KEYS_PER_QUERY = 20
"""The challenge reports recall@N for N up to 20."""


def write_submission(directory: str, benchmark: Benchmark, answers: Sequence[Answer]) -> list[str]:
    """Publish `submission_global.txt` and `submission_reranked.txt` below `directory`; returns their names.

    With rerank.decision=fused|consensus, also `submission_decided.txt`.

    One line per query, in query order: the query's key, then the keys of its best answers, separated by spaces.
    """
    rankings = {
        "submission_global.txt": [answer.candidates for answer in answers],
        "submission_reranked.txt": [answer.reranked for answer in answers],
    }
    if any(answer.decided is not None for answer in answers):
        rankings["submission_decided.txt"] = [final_order(answer) for answer in answers]
    for name, ranked in rankings.items():
        storage.write_bytes(storage.join(directory, name), submission_text(benchmark, ranked).encode())
    return list(rankings)


def submission_text(benchmark: Benchmark, ranked: Sequence[NDArray[np.int64]]) -> str:
    """The lines for database ids `ranked[q]`, best first: up to `KEYS_PER_QUERY` per query.

    A photo's key is its file name without folder and suffix. An unreadable query has only its own key.
    """
    lines = []
    for query_path, ids in zip(benchmark.queries.paths, ranked, strict=True):
        paths = [query_path, *(benchmark.database.path(int(image_id)) for image_id in ids[:KEYS_PER_QUERY])]
        lines.append(" ".join(PurePosixPath(path).stem for path in paths) + "\n")
    return "".join(lines)
