"""What became of each query: right, broken, missed, out of reach. Predictions are read in batches, in bounded memory.

Q queries, K re-ranked candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pairvpr.data.sealed import DamagedFileError
from pairvpr.evaluation.position_errors import errors_m
from pairvpr.evaluation.predictions_file import EXPECTED, FinalOrder, prediction_batches
from pairvpr.report.finished import FinishedRun

COLUMNS = ("query_id", "candidates", "reranked", "pair_scores", "positives", "confidence", "in_map")
ESTIMATE = ("estimated_east_m", "estimated_north_m")
DECIDED_COLUMNS = ("decided", *ESTIMATE)
"""Further columns of a run with a decision."""
NOBODY = -1
"""Id of an answer where there is none."""


class Kind(StrEnum):
    """What became of a query; each is of one kind."""

    right = "right"
    missed = "missed"
    out_of_reach = "out_of_reach"
    no_match = "no_match"
    no_candidates = "no_candidates"
    unreadable = "unreadable"
    answered = "answered"


KINDS = tuple(Kind)
MEANING = {
    Kind.right: "Right",
    Kind.missed: "Missed among candidates",
    Kind.out_of_reach: "Out of retrieval's reach",
    Kind.no_match: "Nothing to find",
    Kind.no_candidates: "No candidates",
    Kind.unreadable: "Unreadable",
    Kind.answered: "Answered",
}


@dataclass(frozen=True)
class Outcomes:
    """All queries of a run, in query order; arrays are (Q,), positions and places (Q, 2)."""

    has_truth: bool
    order: FinalOrder
    """Which answers are the final ones."""
    kind: NDArray[np.uint8]
    """Position in `KINDS`."""
    corrected: NDArray[np.bool_]
    """Wrong by descriptor, right in the end."""
    broken: NDArray[np.bool_]
    """Right by descriptor, wrong in the end."""
    refused: NDArray[np.bool_]
    """Answered by "not in this map"."""
    confidence: NDArray[np.float32]
    """NaN where there is none."""
    best_score: NDArray[np.float32]
    """Of the best pair; NaN without one."""
    first_global: NDArray[np.int64]
    first_reranked: NDArray[np.int64]
    first_final: NDArray[np.int64]
    """Ids of the best answer by descriptor, by pair score, in the end; `NOBODY` without one."""
    estimated_m: NDArray[np.float64]
    """(Q, 2) where a decision puts the query; NaN where it does not."""

    def __len__(self) -> int:
        return len(self.kind)

    def is_kind(self, kind: Kind) -> NDArray[np.bool_]:
        """(Q,) which queries are of a kind."""
        return self.kind == KINDS.index(kind)

    def tags(self) -> dict[str, tuple[str, NDArray[np.bool_]]]:
        """By name the label of each filter and the queries (Q,) that it shows; those that show something alone."""
        found = {str(kind): (MEANING[kind], self.is_kind(kind)) for kind in KINDS}
        found = {
            "right": found.pop("right"),
            "corrected": ("Corrected", self.corrected),
            "broken": ("Broken", self.broken),
            **found,
            "refused": ("Refused", self.refused),
        }
        return {name: its for name, its in found.items() if its[1].any()}


def read_outcomes(run: FinishedRun) -> Outcomes:
    """What became of all queries of a run. Raises `UserError` for a file of predictions of another run."""
    parts: list[dict[str, NDArray[Any]]] = []
    has_truth = True
    for batch in prediction_batches(run.predictions, _columns(run.order)):
        has_truth &= batch.column("positives").null_count == 0
        parts.append(_of_batch(batch, run.order))
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
    expected = run.metrics["protocol"].get("num_queries")
    number = len(whole["kind"]) if whole else 0
    ids = whole.pop("query_id", np.empty(0))
    if number != expected or number != len(run.queries) or not np.array_equal(ids, np.arange(number)):
        raise DamagedFileError(
            run.predictions, f"{number} queries, {expected} in metrics.json, {len(run.queries)} photos", EXPECTED
        )
    most = max((int(whole[name].max(initial=NOBODY)) for name in whole if name.startswith("first_")), default=NOBODY)
    if most >= len(run.database):
        raise DamagedFileError(run.predictions, f"photo {most} of {len(run.database)}", EXPECTED)
    if whole:
        whole["kind"][run.rejected_queries] = KINDS.index(Kind.unreadable)
    return Outcomes(has_truth=has_truth, order=run.order, **whole)


def _columns(order: FinalOrder) -> tuple[str, ...]:
    return (*COLUMNS, *DECIDED_COLUMNS) if order.is_decided else COLUMNS


def _of_batch(batch: pa.RecordBatch, order: FinalOrder) -> dict[str, NDArray[Any]]:
    """The arrays of `Outcomes` for some queries, and their ids; photos that were never read have no candidates."""
    truth = batch.column("positives").null_count == 0
    reranked, positives = _Lists(batch, "reranked"), _Lists(batch, "positives")
    final = _Lists(batch, order.ids)
    first_global, first_final = _Lists(batch, "candidates").first(), final.first()
    was_right, is_right = positives.holds(first_global), positives.holds(first_final)
    kind = np.full(len(batch), KINDS.index(Kind.answered), np.uint8)
    if truth:
        kind[:] = KINDS.index(Kind.out_of_reach)
        kind[positives.any_in(final)] = KINDS.index(Kind.missed)
        kind[positives.lengths == 0] = KINDS.index(Kind.no_match)
        kind[is_right] = KINDS.index(Kind.right)
    kind[first_final == NOBODY] = KINDS.index(Kind.no_candidates)
    # With candidates and without an answer: the photo was gone when its pairs were to be scored.
    kind[(first_final == NOBODY) & (first_global != NOBODY)] = KINDS.index(Kind.unreadable)
    axes = [_floats(batch, name) if order.is_decided else np.full(len(batch), np.nan) for name in ESTIMATE]
    in_map = batch.column("in_map").fill_null(True).to_numpy(zero_copy_only=False)
    return {
        "query_id": batch.column("query_id").to_numpy(),
        "kind": kind,
        "corrected": is_right & ~was_right,
        "broken": was_right & ~is_right,
        "refused": ~in_map.astype(np.bool_),
        "confidence": _floats(batch, "confidence").astype(np.float32),
        "best_score": _Lists(batch, "pair_scores").first(np.nan).astype(np.float32),
        "first_global": first_global,
        "first_reranked": reranked.first(),
        "first_final": first_final,
        "estimated_m": np.stack(axes, axis=1),
    }


def _floats(batch: pa.RecordBatch, name: str) -> NDArray[np.float64]:
    return batch.column(name).to_numpy(zero_copy_only=False).astype(np.float64)


class _Lists:
    """A column of lists, flat: `values` of all rows one behind the other, `rows` says whose each is."""

    def __init__(self, batch: pa.RecordBatch, name: str) -> None:
        column = batch.column(name)
        self.lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        self.values = column.flatten().to_numpy(zero_copy_only=False)
        self.rows = np.repeat(np.arange(len(column)), self.lengths)

    def first(self, nothing: float = NOBODY) -> NDArray[Any]:
        """(n,) the first value of each row."""
        found = np.full(len(self.lengths), nothing, np.float64 if np.isnan(nothing) else np.int64)
        has_some = self.lengths > 0
        found[has_some] = self.values[(np.cumsum(self.lengths) - self.lengths)[has_some]]
        return found

    def holds(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(n,) whether each row holds its id (n,)."""
        found = np.zeros(len(self.lengths), np.bool_)
        found[self.rows[self.values == ids[self.rows]]] = True
        return found

    def any_in(self, other: _Lists) -> NDArray[np.bool_]:
        """(n,) whether each row shares an id with the same row of another column."""
        stride = 1 + max(self.values.max(initial=0), other.values.max(initial=0))
        shared = np.isin(other.rows * stride + other.values, self.rows * stride + self.values)
        found = np.zeros(len(self.lengths), np.bool_)
        found[other.rows[shared]] = True
        return found


def best_positions(ids: NDArray[np.int64], utm_m: NDArray[np.float64]) -> NDArray[np.float64]:
    """(Q, 2) metres of the photos `ids` (Q,); NaN for `NOBODY`, and where a position is not known."""
    found = np.full((len(ids), 2), np.nan)
    found[ids != NOBODY] = utm_m[ids[ids != NOBODY]]
    return found


def error_of(run: FinishedRun, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """(Q,) metres from answers `ids` (Q,) to the queries: infinite without a position, NaN of a query without one."""
    return errors_m(best_positions(ids, run.database.utm_m), run.queries.utm_m)


def rows_of(run: FinishedRun, chosen: NDArray[np.int64]) -> Iterator[dict[str, Any]]:
    """The rows of predictions.parquet of queries `chosen` (n,), ascending, as plain values."""
    columns = (*_columns(run.order), "query_path", "squared_distances", *(["evidence"] if run.order.is_decided else []))
    first = 0
    for batch in prediction_batches(run.predictions, columns):
        inside = chosen[np.searchsorted(chosen, first) : np.searchsorted(chosen, first + len(batch))] - first
        first += len(batch)
        if len(inside):
            yield from batch.take(pa.array(inside)).to_pylist()
