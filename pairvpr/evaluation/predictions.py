"""`predictions.parquet`: one row for each query, in query order. Q queries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pairvpr.data import sealed
from pairvpr.data.manifest import Benchmark
from pairvpr.evaluation.confidence import Judge
from pairvpr.evaluation.predictions_file import DECIDED_SCHEMA, SCHEMA
from pairvpr.retrieval.decision import Decided
from pairvpr.retrieval.pipeline import Answer


def predictions_table(benchmark: Benchmark, answers: Sequence[Answer], judge: Judge | None = None) -> pa.Table:
    """The answers with the columns of `SCHEMA`; `positives` is null where there is no ground truth.

    `confidence` is null without a judge or an answer; `in_map` is also null without a threshold.
    Decided answers also have the columns of `DECIDED_SCHEMA`.
    """
    positives = benchmark.positives
    confidence, in_map = _judged(answers, judge)
    table = pa.table(
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
    decided = [answer.decided for answer in answers if answer.decided is not None]
    return _with_decided(table, decided) if decided else table


def _with_decided(table: pa.Table, decided: Sequence[Decided]) -> pa.Table:
    """The table with the columns of `DECIDED_SCHEMA`; an estimate is null if the best answer has no position."""
    estimates = np.array([(*its.position_m, its.spread_m) for its in decided])
    columns = [
        pa.array([its.ids for its in decided], pa.list_(pa.int64())),
        pa.array([its.evidence for its in decided], pa.list_(pa.float32())),
        *(pa.array(values, pa.float64(), mask=np.isnan(values)) for values in estimates.T),
    ]
    for field, column in zip(DECIDED_SCHEMA, columns, strict=True):
        table = table.append_column(field, column)
    return table


def top_scores(answers: Sequence[Answer]) -> NDArray[np.float32]:
    """(Q,) the input of a query's confidence: its best pair score or a decision's log odds; NaN without an answer."""
    return np.array([_top_score(answer) for answer in answers], np.float32)


def _top_score(answer: Answer) -> float:
    if answer.decided is not None:
        return answer.decided.log_odds
    return float(answer.pair_scores[0]) if len(answer.pair_scores) else float("nan")


def final_order(answer: Answer) -> NDArray[np.int64]:
    """The answers to a query, best first: as decided, or by pair score alone."""
    return answer.reranked if answer.decided is None else answer.decided.ids


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
    sealed.write_parquet(url, table)
