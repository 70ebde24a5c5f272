"""The columns of `predictions.parquet`, and how to read them back; needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class FinalOrder:
    """Which columns hold the final answers of a run, best first, and what texts call them."""

    ids: str
    scores: str
    label: str
    """As a heading: Decided."""
    words: str
    """In a sentence and in a table: decided by consensus."""
    unit: str
    """Of `scores`: evidence."""

    @property
    def is_decided(self) -> bool:
        """Whether more than the pair score ordered the answers."""
        return self.ids == "decided"

    @property
    def is_retrieval(self) -> bool:
        """Whether nothing was re-ranked. The scores are then squared distances, of which less is better."""
        return self.ids == "candidates"

    def of(self, row: Mapping[str, Any]) -> tuple[Sequence[int], Sequence[float]]:
        """Ids and scores of one row's answers, best first."""
        return row[self.ids], row[self.scores]


RERANKED = FinalOrder("reranked", "pair_scores", "Re-ranked", "re-ranked", "score")
RETRIEVED = FinalOrder("candidates", "squared_distances", "Final, by descriptor", "by descriptor", "d²")


def final_order_of(metrics: Mapping[str, Any]) -> FinalOrder:
    """The final order of a run's answers, from its metrics.json: decided, else re-ranked, else, where K = 0, retrieved.

    Raises `KeyError` or `TypeError` for damaged content.
    """
    if metrics.get("decision"):
        words = f"decided by {metrics['decision']['rule']}"
        return FinalOrder("decided", "evidence", "Decided", words, "evidence")
    return RERANKED if metrics["num_candidates"] else RETRIEVED


def final_recall(metrics: Mapping[str, Any]) -> Mapping[str, float]:
    """Recall in percent by N as text, of the final order of a run with ground truth."""
    order = final_order_of(metrics)
    if order.is_decided:
        return metrics["decision"]["recall"]
    return metrics["recall"]["global" if order.is_retrieval else "reranked"]


def read_predictions(url: str, columns: Sequence[str]) -> pa.Table:
    """Some columns of predictions.parquet. Raises `UserError` if it is missing, damaged or something else."""
    table = sealed.read_parquet(url, pa.schema([SCHEMA.field(name) for name in columns]), EXPECTED)
    if table is None:
        raise UserError(f"{url}: no such file; {EXPECTED}")
    return table


def prediction_batches(url: str, columns: Sequence[str], num_rows: int = 1024) -> Iterator[pa.RecordBatch]:
    """Some columns of predictions.parquet, so many queries at a time. Raises `UserError` as `read_predictions`."""
    schema = pa.schema([field for field in (*SCHEMA, *DECIDED_SCHEMA) if field.name in columns])
    with sealed.opened_parquet(url, schema, EXPECTED) as file:
        yield from file.iter_batches(num_rows, columns=list(columns), use_threads=False)
