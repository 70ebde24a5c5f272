"""What a photo's search gives: the photos of the index that may show its place, and what they say about it together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pairvpr.data.utm import UtmZone
from pairvpr.evaluation.confidence import Rules
from pairvpr.evaluation.predictions import final_order, top_scores
from pairvpr.opened import Generation
from pairvpr.retrieval.decision import position_of_best
from pairvpr.retrieval.pipeline import Answer
from pairvpr.where import Utm

UNCALIBRATED_NATS_PER_SCORE = 0.5
"""Weight of a pair score in an estimated position without a calibration: the score is the sum of two logits."""


@dataclass(frozen=True, slots=True)
class Match:
    """A photo of the index that may show the same place as the query photo."""

    path: str
    """Path relative to the folder of the index's photos."""
    url: str
    """Path or URL that can be opened."""
    database_id: int
    latitude: float | None
    """Degrees of WGS84; None if the photo's position or the index's UTM zone is unknown."""
    longitude: float | None
    utm: Utm | None
    """Metres in the index's UTM zone; None if the photo's position is unknown."""
    heading_deg: float | None
    """Viewing direction, clockwise from north; None if unknown."""
    squared_distance: float
    """Squared distance of the two global descriptors, which have unit length."""
    pair_score: float | None
    """Sum of both directions' logits, higher = more likely the same place; None from `retrieve`, which scores no pairs.

    Minus infinity if the index's photo is no longer readable or has changed since it was described.
    """
    confidence: float | None
    """Probability that the best match shows the place; None without a calibration.

    For the matches behind it: what they would have as the best one. None for them where `rerank.decision` is not pair.
    """


@dataclass(frozen=True, slots=True)
class Estimate:
    """Where the photo was taken, by the photos within 25 m of the best match (or within the radius of the votes)."""

    utm: Utm
    """Their mean, weighted by score, in metres in the index's UTM zone."""
    latitude: float | None
    """Degrees of WGS84; None if the index's UTM zone is unknown."""
    longitude: float | None
    spread_m: float
    """Root mean square distance of them from it; 0 of a single one."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """How long each step of a request took. Those of a request with several photos are of all together."""

    decode: float
    describe: float
    search: float
    rerank: float


@dataclass(frozen=True, slots=True)
class Located:
    """The answer for one photo. All of it belongs to one generation of the index."""

    matches: list[Match]
    """The best k, best first."""
    confidence: float | None
    """Probability that the best match shows the place; None without a calibration or a match."""
    in_map: bool | None
    """Whether that is at least `rerank.not_in_map_below`; None without one."""
    position: Estimate | None
    """None if the best match has no known position."""
    generation: int
    zone: UtmZone | None
    """The UTM zone of the index's metres, if known."""
    seconds: Seconds


def located(now: Generation, answer: Answer, k: int, rules: Rules, seconds: Seconds) -> Located:
    """The answer for people: its k best matches and what they say together."""
    matches = _best(now, answer, k, rules)
    confidence, in_map = None, None
    if rules.judge is not None:
        top = rules.judge.confidence(top_scores([answer]))
        confidence, is_there = known(top[0]), rules.judge.in_map(top)
        in_map = None if is_there is None or confidence is None else bool(is_there[0])
    return Located(matches, confidence, in_map, _estimate(now, answer, rules), now.number, now.map.zone, seconds)


def _best(now: Generation, answer: Answer, k: int, rules: Rules) -> list[Match]:
    best = final_order(answer)[:k]
    distance_of = dict(zip(answer.candidates.tolist(), answer.squared_distances, strict=True))
    score_of = dict(zip(answer.reranked.tolist(), answer.pair_scores, strict=True))
    distances, scores = (
        np.array([of[image_id] for image_id in best.tolist()], np.float32) for of in (distance_of, score_of)
    )
    confidence = None
    if rules.judge is not None and answer.decided is None:
        confidence = rules.judge.confidence(scores)
    elif rules.judge is not None:
        confidence = np.full(len(best), np.nan, np.float32)
        confidence[:1] = rules.judge.confidence(top_scores([answer]))
    return matches_of(now, best, distances, scores, confidence)


def _estimate(now: Generation, answer: Answer, rules: Rules) -> Estimate | None:
    if answer.decided is not None:
        east_m, north_m, spread_m = *answer.decided.position_m, answer.decided.spread_m
    else:
        nats = UNCALIBRATED_NATS_PER_SCORE if rules.judge is None else 1 / rules.judge.temperature
        utm_m = now.map.places.utm_m[answer.reranked]
        east_m, north_m, spread_m = position_of_best(answer.pair_scores, utm_m, nats)
    if np.isnan(east_m):
        return None
    latitude, longitude = now.map.degrees_of(np.array([[east_m, north_m]]))[0]
    return Estimate(Utm(east_m, north_m), known(latitude), known(longitude), spread_m)


def matches_of(
    now: Generation,
    ids: NDArray[np.int64],
    squared_distances: NDArray[np.float32],
    scores: NDArray[np.float32] | None = None,
    confidence: NDArray[np.float32] | None = None,
) -> list[Match]:
    """Photos (n,) as matches, in this order."""
    degrees, places = now.map.degrees(ids), now.map.places
    return [
        Match(
            path=now.photos.path(image_id),
            url=now.photos.url(image_id),
            database_id=image_id,
            latitude=known(degrees[row, 0]),
            longitude=known(degrees[row, 1]),
            utm=_utm(places.utm_m[image_id]),
            heading_deg=known(places.heading_deg[image_id]),
            squared_distance=float(squared_distances[row]),
            pair_score=None if scores is None else float(scores[row]),
            confidence=None if confidence is None else known(confidence[row]),
        )
        for row, image_id in enumerate(ids.tolist())
    ]


def known(value: Any) -> float | None:
    """None for NaN."""
    return None if np.isnan(value) else float(value)


def _utm(position: Sequence[float] | NDArray[np.float64]) -> Utm | None:
    return None if np.isnan(position).any() else Utm(*np.asarray(position).tolist())
