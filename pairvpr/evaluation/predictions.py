"""`predictions.parquet`: one row for each query, in query order. Q queries."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pairvpr.data import storage
from pairvpr.data.manifest import Benchmark
from pairvpr.evaluation.confidence import Judge
from pairvpr.retrieval.pipeline import Answer

SCHEMA = pa.schema(
    [
        ("query_id", pa.int64()),
        ("query_path", pa.string()),
        ("candidates", pa.list_(pa.int64())),
        ("squared_distances", pa.list_(pa.float32())),
        ("reranked", pa.list_(pa.int64())),
        ("pair_scores", pa.list_(pa.float32())),
        ("positives", pa.list_(pa.int64())),
        ("confidence", pa.float32()),
        ("in_map", pa.bool_()),
    ]
)


def predictions_table(benchmark: Benchmark, answers: Sequence[Answer], judge: Judge | None = None) -> pa.Table:
    """The answers with the columns of `SCHEMA`; `positives` is null where there is no ground truth.

    `confidence` is null without a judge and where there is no answer, `in_map` also where the judge is not asked.
    """
    positives = benchmark.positives
    confidence, in_map = _judged(answers, judge)
    return pa.table(
        [
            pa.array([answer.query_id for answer in answers]),
            pa.array(benchmark.queries.paths),
            pa.array([answer.candidates for answer in answers], pa.list_(pa.int64())),
            pa.array([answer.squared_distances for answer in answers], pa.list_(pa.float32())),
            pa.array([answer.reranked for answer in answers], pa.list_(pa.int64())),
            pa.array([answer.pair_scores for answer in answers], pa.list_(pa.float32())),
            pa.nulls(len(answers), pa.list_(pa.int64()))
            if positives is None
            else pa.array(positives, pa.list_(pa.int64())),
            confidence,
            in_map,
        ],
        schema=SCHEMA,
    )


def top_scores(answers: Sequence[Answer]) -> NDArray[np.float32]:
    """(Q,) each query's best pair score; NaN where there is none."""
    best = [answer.pair_scores[0] if len(answer.pair_scores) else np.nan for answer in answers]
    return np.array(best, np.float32)


def _judged(answers: Sequence[Answer], judge: Judge | None) -> tuple[pa.Array, pa.Array]:
    """The columns `confidence` and `in_map`."""
    nothing = pa.nulls(len(answers), pa.float32()), pa.nulls(len(answers), pa.bool_())
    if judge is None:
        return nothing
    confidence = judge.confidence(top_scores(answers))
    unknown, in_map = np.isnan(confidence), judge.in_map(confidence)
    return (
        pa.array(confidence, pa.float32(), mask=unknown),
        nothing[1] if in_map is None else pa.array(in_map, pa.bool_(), mask=unknown),
    )


def write_predictions(url: str, table: pa.Table) -> None:
    """Publish the table; equal tables give equal bytes."""
    sink = io.BytesIO()
    pq.write_table(table, sink)
    storage.write_bytes(url, sink.getvalue())
