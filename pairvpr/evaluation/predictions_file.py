"""The columns of `predictions.parquet`, and how to read them back; needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa

from pairvpr.data import sealed
from pairvpr.errors import UserError

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
DECIDED_SCHEMA = pa.schema(
    [
        ("decided", pa.list_(pa.int64())),
        ("evidence", pa.list_(pa.float32())),
        ("estimated_east_m", pa.float64()),
        ("estimated_north_m", pa.float64()),
        ("estimated_spread_m", pa.float64()),
    ]
)
"""Further columns for rerank.decision=fused|consensus."""

EXPECTED = "expected the predictions of a run; the line that made them makes them anew"


def read_predictions(url: str, columns: Sequence[str]) -> pa.Table:
    """Some columns of predictions.parquet. Raises `UserError` if it is missing, damaged or something else."""
    table = sealed.read_parquet(url, pa.schema([SCHEMA.field(name) for name in columns]), EXPECTED)
    if table is None:
        raise UserError(f"{url}: no such file; {EXPECTED}")
    return table


def prediction_batches(url: str, columns: Sequence[str], num_rows: int = 1024) -> Iterator[pa.RecordBatch]:
    """Some columns of predictions.parquet, so many queries at a time; those of a decision only where there is one.

    Raises `UserError` as `read_predictions`.
    """
    schema = pa.schema([SCHEMA.field(name) for name in columns if name in SCHEMA.names])
    with sealed.opened_parquet(url, schema, EXPECTED) as file:
        there = [name for name in columns if name in file.schema_arrow.names]
        yield from file.iter_batches(num_rows, columns=there, use_threads=False)
