"""A finished run on disk, made up at random and written by the project's own functions: for what reads runs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from pairvpr.config.schema import DecisionRule
from pairvpr.data import sealed, storage
from pairvpr.data.manifest import Benchmark, Manifest
from pairvpr.evaluation.confidence import Judge
from pairvpr.evaluation.predictions import predictions_table, write_predictions
from pairvpr.evaluation.report import RunFacts, metrics
from pairvpr.index.descriptor_shards import REJECTED, REJECTED_SCHEMA
from pairvpr.retrieval.decision import Decider, Decision, Votes, Weights
from pairvpr.retrieval.pipeline import Answer, decided
from tests.support.index import write_index
from tests.support.small import small_model_config

RADIUS_M = 25.0
NUM_CANDIDATES = 8
FACTS = RunFacts(
    index={"kind": "flat"},
    weights_sha256="ab" * 32,
    untrained=False,
    num_candidates=NUM_CANDIDATES,
    seconds_describe=1.5,
    seconds_retrieve=0.25,
    seconds_rerank=6.0,
    num_rejected_database=0,
    num_rejected_queries=1,
    judge=Judge(temperature=1.2, midpoint=0.3, not_in_map_below=0.8),
)


DECISION = Decision(
    weights=Weights(pair_score=0.4, squared_distance=1.0, log_rank=0.3),
    votes=Votes(radius_m=30.0, softness=1.0, own=1.0, weight=2.0),
    nothing=0.5,
    temperature=1.0,
    midpoint=0.0,
    stop_margin=None,
)


@dataclass(frozen=True)
class MadeUpRun:
    """A run in `folder`, and what it was made from."""

    folder: str
    benchmark: Benchmark
    answers: Sequence[Answer]
    metrics: dict[str, Any]


def make_run(
    folder: Path,
    *,
    name: str = "made_up",
    num_queries: int = 40,
    num_database: int = 60,
    seed: int = 0,
    order_seed: int | None = None,
    has_truth: bool = True,
    has_positions: bool = True,
    decision: Decision | None = None,
    num_candidates: int = NUM_CANDIDATES,
    without_candidates: Sequence[int] = (),
    gone: Sequence[int] = (),
    photos: str | None = None,
    paths: Sequence[str] = (),
) -> MadeUpRun:
    """Queries stand near database photos, some far from all; retrieval and re-ranking are right now and then.

    A `decision` orders the answers. With `num_candidates` 0 nothing is re-ranked. Queries `without_candidates`
    found nothing, the photos of `gone` ones were gone before they were re-ranked. `paths` are the names of the first
    database photos; `order_seed` draws other scores for the same test. The photos themselves are not there:
    `draw_photos` makes them, below `photos` (path or URL).
    """
    rng = np.random.default_rng(seed)
    database_m = 1000.0 + rng.uniform(0, 300, (num_database, 2))
    queries_m = database_m[rng.integers(num_database, size=num_queries)] + rng.normal(0, 12, (num_queries, 2))
    queries_m[::9] += 5000.0
    names = [*paths, *(f"db/{number:05d}.jpg" for number in range(len(paths), num_database))]
    near = np.hypot(*(queries_m[:, None] - database_m).transpose(2, 0, 1)) <= RADIUS_M
    places = (database_m, queries_m) if has_positions else (None, None)
    benchmark = Benchmark(
        name=name,
        database=Manifest.of(f"{photos or folder / 'photos'}/database", names, places[0]),
        queries=Manifest.of(
            f"{photos or folder / 'photos'}/queries", [f"{number:05d}.jpg" for number in range(num_queries)], places[1]
        ),
        positives=[np.flatnonzero(row) for row in near] if has_truth else None,
        protocol={"positives": "radius", "radius_m": RADIUS_M},
        query_groups=[f"city {number % 3}" for number in range(num_queries)],
        query_kinds={
            "light": ["night" if number % 4 == 0 else "day" for number in range(num_queries)],
            "sequence": [f"drive {number // 7}" for number in range(num_queries)],
        },
        query_subtasks={"d2n": np.arange(0, num_queries, 4), "o2n": np.arange(0, num_queries, 2)},
    )
    answers = _answers(near, rng if order_seed is None else np.random.default_rng(order_seed), num_candidates)
    nothing, none = np.empty(0, np.int64), np.empty(0, np.float32)
    for query in without_candidates:
        answers[query] = Answer(query, nothing, none, nothing, none)
    for query in gone:
        answers[query] = replace(answers[query], reranked=nothing, pair_scores=none)
    facts = replace(FACTS, num_candidates=num_candidates, num_rejected_queries=1 + len(gone))
    if decision is not None:
        answers = decided(answers, Decider(decision, benchmark.database.utm_m))
        facts = replace(facts, decision=DecisionRule.consensus)
    content = metrics(benchmark, answers, small_model_config(), facts)
    write_files(folder, benchmark, content, benchmark.queries.paths[-1:])
    write_predictions(str(folder / "predictions.parquet"), predictions_table(benchmark, answers, FACTS.judge))
    return MadeUpRun(str(folder), benchmark, answers, content)


def _answers(near: NDArray[np.bool_], rng: np.random.Generator, num_candidates: int) -> list[Answer]:
    """The last query could not be read."""
    answers = []
    for query, row in enumerate(near):
        distances = np.sort(rng.uniform(0, 2, near.shape[1])).astype(np.float32)
        candidates = np.argsort(rng.uniform(0, 1, near.shape[1]) - 0.5 * row)
        scores = rng.normal(0, 2, NUM_CANDIDATES) + 2.5 * row[candidates[:NUM_CANDIDATES]]
        scores = scores[:num_candidates]
        order = np.argsort(-scores)
        answers.append(
            Answer(
                query,
                candidates.astype(np.int64),
                distances,
                candidates[:num_candidates][order].astype(np.int64),
                scores[order].astype(np.float32),
            )
        )
    nothing, none = np.empty(0, np.int64), np.empty(0, np.float32)
    answers[-1] = Answer(len(near) - 1, nothing, none, nothing, none)
    return answers


def write_files(folder: Path, benchmark: Benchmark, content: dict[str, Any], rejected: Sequence[str] = ()) -> None:
    """All files of a finished run but its predictions; the queries `rejected` could not be read."""
    index = str(folder / "index")
    write_index(index, [], np.eye(len(benchmark.database), 4, dtype=np.float32) + 0.1, images=benchmark.database)
    (folder / "queries").mkdir()
    benchmark.queries.write(str(folder / "queries" / "images.parquet"))
    rows = [{"path": path, "error": "cut short"} for path in rejected]
    sealed.write_parquet(str(folder / "queries" / REJECTED), pa.Table.from_pylist(rows, REJECTED_SCHEMA))
    sealed.write_json(str(folder / "queries" / "described.json"), {})
    settings = {"queries": {"root": benchmark.queries.root}, "index": {"path": index}, "model": {}}
    sealed.write_json(str(folder / "settings.json"), settings)
    sealed.write_json(str(folder / "metrics.json"), content)


def draw_photos(benchmark: Benchmark, *, size_px: tuple[int, int] = (64, 48)) -> None:
    """A plain picture for every photo, each of another colour."""
    for manifest in (benchmark.database, benchmark.queries):
        for number in range(len(manifest)):
            sink = io.BytesIO()
            Image.new("RGB", size_px, (37 * number % 256, 91 * number % 256, 160)).save(sink, "JPEG")
            storage.write_bytes(manifest.url(number), sink.getvalue())
