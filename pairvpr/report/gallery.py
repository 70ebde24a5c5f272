"""The pictured queries of a report as plain values for the page: photos, answers, scores, metres."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pairvpr.evaluation.predictions_file import FinalOrder
from pairvpr.report.finished import FinishedRun
from pairvpr.report.outcomes import KINDS, Outcomes, rows_of

NUM_ANSWERS = 3
"""Answers that are pictured before and after re-ranking."""


@dataclass(frozen=True, kw_only=True)
class ShownAnswer:
    """A database photo beside a query."""

    photo: int
    """Position in the page's list of photos."""
    right: bool | None
    """None without ground truth."""
    metres: float | None
    """From the query; None where one of the two positions is not known."""
    score: float | None
    """Pair score, or evidence of a decision; descriptor distance of an answer by descriptor; None of the truth."""


@dataclass(kw_only=True)
class ShownQuery:
    """A query with its first answers."""

    id: int
    photo: int
    kind: str
    tags: list[str]
    confidence: float | None
    error: float | None
    """Metres from the final answer to the query; None where that is not known."""
    retrieved: list[ShownAnswer]
    final: list[ShownAnswer]
    truth: ShownAnswer | None
    """The nearest positive, or the best ranked one where positions are not known."""
    heat: dict[str, str] = field(default_factory=dict)
    """What the re-ranker looked at in the query and in its final answer, as pictures to lay over them."""


class Photos:
    """The photos of a page, each once: `add` gives its position in the list. A run `beside` has the same ones."""

    def __init__(self, run: FinishedRun, beside: FinishedRun | None = None) -> None:
        self.max_megapixels = max(its.max_megapixels for its in (run, beside or run))
        """Photos of more pixels were rejected."""
        self._parts = {"database": run.database, "queries": run.queries}
        self._places: dict[tuple[str, int], int] = {}

    def add(self, part: str, image_id: int) -> int:
        """Position of a photo of `database` or `queries`."""
        return self._places.setdefault((part, image_id), len(self._places))

    @property
    def paths(self) -> list[str]:
        """Their names, relative to their folders."""
        return [self._parts[part].path(image_id) for part, image_id in self._places]

    @property
    def urls(self) -> list[str]:
        """Where they lie."""
        return [self._parts[part].url(image_id) for part, image_id in self._places]


def shown_queries(
    run: FinishedRun, outcomes: Outcomes, chosen: NDArray[np.int64], photos: Photos, error_m: NDArray[np.float64]
) -> list[ShownQuery]:
    """The queries `chosen` (ascending ids) with their answers. `error_m` (Q,) is the distance of final answers."""
    tags = {name: mask for name, (_, mask) in outcomes.tags().items()}
    rows = list(rows_of(run, chosen))
    utm_m, queries_m = run.database.utm_m, run.queries.utm_m
    return [
        ShownQuery(
            id=row["query_id"],
            photo=photos.add("queries", row["query_id"]),
            kind=str(KINDS[outcomes.kind[row["query_id"]]]),
            tags=[name for name, mask in tags.items() if mask[row["query_id"]]],
            confidence=row["confidence"],
            error=_finite(float(error_m[row["query_id"]])),
            **_answers(row, run.order, photos, utm_m, queries_m[row["query_id"]]),
        )
        for row in rows
    ]


def shown_between(
    first: FinishedRun, second: FinishedRun, chosen: NDArray[np.int64], photos: Photos, change: str
) -> list[ShownQuery]:
    """The queries `chosen` (ascending ids) of two runs of one test, with the final answers of either."""
    utm_m, queries_m = second.database.utm_m, second.queries.utm_m
    shown = []
    for before, after in zip(rows_of(first, chosen), rows_of(second, chosen), strict=True):
        query = after["query_id"]
        view = _View(after["positives"], photos, utm_m, queries_m[query])
        final = view.answers(*second.order.of(after))
        shown.append(
            ShownQuery(
                id=query,
                photo=photos.add("queries", query),
                kind=change,
                tags=[change],
                confidence=after["confidence"],
                error=final[0].metres if final else None,
                retrieved=view.answers(*first.order.of(before)),
                final=final,
                truth=view.truth(after["candidates"]),
            )
        )
    return shown


def _answers(
    row: Mapping[str, Any], order: FinalOrder, photos: Photos, utm_m: NDArray[np.float64], query_m: NDArray[np.float64]
) -> dict[str, Any]:
    """`retrieved`, `final` and `truth` of a row of predictions.parquet."""
    view = _View(row["positives"], photos, utm_m, query_m)
    return {
        "retrieved": view.answers(row["candidates"], row["squared_distances"]),
        "final": view.answers(*order.of(row)),
        "truth": view.truth(row["candidates"]),
    }


class _View:
    """The database as one query sees it: who is right, how far away."""

    def __init__(
        self,
        positives: Sequence[int] | None,
        photos: Photos,
        utm_m: NDArray[np.float64],
        query_m: NDArray[np.float64],
    ) -> None:
        self._positives = None if positives is None else set(positives)
        self._photos = photos
        self._utm_m = utm_m
        self._query_m = query_m

    def answers(self, ids: Sequence[int], scores: Sequence[float]) -> list[ShownAnswer]:
        """The first ones."""
        return [self._shown(*its) for its in list(zip(ids, scores, strict=True))[:NUM_ANSWERS]]

    def truth(self, candidates: Sequence[int]) -> ShownAnswer | None:
        """The nearest positive, or the best ranked one where positions are not known."""
        if not self._positives:
            return None
        positives = sorted(self._positives)
        apart_m = np.hypot(*(self._utm_m[positives] - self._query_m).T)
        if not np.isnan(apart_m).all():
            return self._shown(positives[int(np.nanargmin(apart_m))], None)
        ranked = (image_id for image_id in candidates if image_id in set(positives))
        return self._shown(next(ranked, positives[0]), None)

    def _shown(self, image_id: int, score: float | None) -> ShownAnswer:
        return ShownAnswer(
            photo=self._photos.add("database", image_id),
            right=None if self._positives is None else image_id in self._positives,
            metres=_finite(math.hypot(*(self._utm_m[image_id] - self._query_m))),
            score=None if score is None else _finite(score),
        )


def _finite(value: float) -> float | None:
    return round(float(value), 4) if math.isfinite(value) else None
