"""`predictions.parquet`: one row for each query, in query order."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pairvpr.data import storage
from pairvpr.data.manifest import Benchmark
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
    ]
)


def predictions_table(benchmark: Benchmark, answers: Sequence[Answer]) -> pa.Table:
    """The answers with the columns of `SCHEMA`; `positives` is null where there is no ground truth."""
    positives = benchmark.positives
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
        ],
        schema=SCHEMA,
    )


def write_predictions(url: str, table: pa.Table) -> None:
    """Publish the table; equal tables give equal bytes."""
    sink = io.BytesIO()
    pq.write_table(table, sink)
    storage.write_bytes(url, sink.getvalue())
