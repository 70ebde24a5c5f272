"""Chooses a query's answer from pair score, descriptor distance and neighbouring candidates. Needs only numpy.

The evidence of a candidate, in nats, is a weighted sum of its pair score, its squared distance and its rank in
retrieval. The softmax over all evidence, with one more entry for "none of them", gives each candidate its share. A
decision with votes adds one term: the share of all candidates within a radius. A decision is a pure function of one
query's candidates; docs/decision.md says how it is fitted.

K candidates, in retrieval order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PLACE_RADIUS_M = 25.0
"""Radius of the cluster around an answer if the decision has no votes: the field's usual tolerance."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights of a candidate's own evidence, none negative; 0 leaves a term out."""

    pair_score: float
    """Nats per unit of pair score: the inverse of the scores' temperature."""
    squared_distance: float
    """Nats per unit of squared distance; they count against a candidate."""
    log_rank: float
    """Nats per unit of ln(1 + rank in retrieval, from 0); they count against a candidate."""

    def __post_init__(self) -> None:
        if min(self.pair_score, self.squared_distance, self.log_rank) < 0:
            raise ValueError("a weight is out of range")

    def prior(self, squared_distances: NDArray[np.float32]) -> NDArray[np.float64]:
        """(K,) the part of the evidence that is known before any pair is scored."""
        places = np.arange(len(squared_distances))
        return -self.squared_distance * np.asarray(squared_distances, np.float64) - self.log_rank * np.log1p(places)

    def evidence(self, scores: NDArray[np.float32], prior: NDArray[np.float64]) -> NDArray[np.float64]:
        """(K,) from pair scores (K,) and `prior`; minus infinity for candidates that were not scored."""
        is_scored = np.isfinite(scores)
        return np.where(
            is_scored, self.pair_score * np.where(is_scored, scores, 0.0).astype(np.float64) + prior, -np.inf
        )


@dataclass(frozen=True, kw_only=True)
class Votes:
    """How candidates at the same place support each other."""

    radius_m: float
    """Candidates within this distance vote for each other; one without a known position votes only for itself."""
    softness: float
    """A voter's share is the softmax of this times its own evidence; below 1, weaker candidates count for more."""
    own: float
    """Factor on a candidate's own evidence; 0 or more."""
    weight: float
    """Nats per unit of ln(share of the votes); 0 or more."""

    def __post_init__(self) -> None:
        if not self.radius_m > 0 or not self.softness > 0 or self.own < 0 or self.weight < 0:
            raise ValueError("a weight is out of range")


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A fitted decision: `fused` without votes, `consensus` with them."""

    weights: Weights
    votes: Votes | None
    nothing: float
    """Evidence, in nats, that no candidate is right."""
    temperature: float
    midpoint: float
    """The confidence is sigmoid((log odds - midpoint) / (2 temperature))."""
    stop_margin: float | None
    """A query is finished when a candidate's own evidence reaches this; None = no early stopping."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError("the temperature is out of range")


@dataclass(frozen=True)
class Decided:
    """One query's answer: ids (K,) and their evidence (K,) in nats, best first; ties keep retrieval order.

    `log_odds` are the uncalibrated log odds that the best answer's place is right; NaN without candidates.
    `position_m` is the estimated (utm_east, utm_north) in metres, a weighted mean of candidates; `spread_m` is the root
    mean square distance of these from it. Both are NaN if the best answer has no known position.
    """

    ids: NDArray[np.int64]
    evidence: NDArray[np.float32]
    log_odds: float
    position_m: tuple[float, float]
    spread_m: float


NOTHING_DECIDED = Decided(
    np.empty(0, np.int64), np.empty(0, np.float32), float("nan"), (float("nan"), float("nan")), float("nan")
)
"""For a query without candidates."""


def decide(
    decision: Decision,
    candidates: NDArray[np.int64],
    squared_distances: NDArray[np.float32],
    scores: NDArray[np.float32],
    utm_m: NDArray[np.float64],
) -> Decided:
    """Order a query's candidates (K,), given in retrieval order with distances, pair scores (K,), metres (K, 2).

    A candidate whose pair score is not finite was not scored, and comes after all others. An unknown position is NaN.
    """
    if not len(candidates):
        return NOTHING_DECIDED
    own = decision.weights.evidence(scores, decision.weights.prior(squared_distances))
    if not np.isfinite(own).any():
        return Decided(candidates, own.astype(np.float32), float("nan"), NOTHING_DECIDED.position_m, float("nan"))
    votes = decision.votes
    is_near = nearness(utm_m, PLACE_RADIUS_M if votes is None else votes.radius_m)
    evidence = own if votes is None else combined(votes, own, is_near)
    order = np.argsort(-evidence, kind="stable")
    best = int(order[0])
    place = is_near[best]
    east_m, north_m, spread_m = _position(evidence, place, utm_m)
    return Decided(
        candidates[order],
        evidence[order].astype(np.float32),
        log_odds(evidence, place if votes is not None else np.arange(len(evidence)) == best, decision.nothing),
        (east_m, north_m),
        spread_m,
    )


def nearness(utm_m: NDArray[np.float64], radius_m: float) -> NDArray[np.bool_]:
    """(K, K) whether candidates at (K, 2) metres are within a radius of each other; each is near itself."""
    apart_m = np.hypot(*(utm_m[:, None] - utm_m[None, :]).transpose(2, 0, 1))
    return (apart_m <= radius_m) | np.eye(len(utm_m), dtype=np.bool_)


def log_share_near(softness: float, own: NDArray[np.float64], is_near: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(K,) log share of the voters near each candidate, from own evidence (K,) and nearness (K, K)."""
    shares = np.exp(softness * (own - own.max()))
    return np.log(np.maximum(is_near @ shares, np.finfo(np.float64).tiny) / shares.sum())


def combined(votes: Votes, own: NDArray[np.float64], is_near: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(K,) evidence with votes; it stays minus infinity for candidates that were not scored."""
    is_scored = np.isfinite(own)
    with_votes = votes.own * np.where(is_scored, own, 0.0) + votes.weight * log_share_near(votes.softness, own, is_near)
    return np.where(is_scored, with_votes, -np.inf)


def log_odds(evidence: NDArray[np.float64], is_place: NDArray[np.bool_], nothing: float) -> float:
    """Log odds of some candidates (K,) against all others and "none of them"."""
    return _log_sum(evidence[is_place]) - float(np.logaddexp(_log_sum(evidence[~is_place]), nothing))


def _log_sum(evidence: NDArray[np.float64]) -> float:
    """Log of the sum of exponentials; minus infinity for an empty array."""
    highest = evidence.max(initial=-np.inf)
    return float(highest) if np.isneginf(highest) else float(highest + np.log(np.exp(evidence - highest).sum()))


def position_of_best(
    scores: NDArray[np.float32], utm_m: NDArray[np.float64], nats_per_score: float
) -> tuple[float, float, float]:
    """East, north and spread in metres from pair scores (K,) alone, best first, of candidates at (K, 2) metres.

    As a decision without votes: the mean of those near the best one. All NaN if its position is unknown, or if no
    candidate was scored.
    """
    if not len(scores) or not np.isfinite(scores[0]):
        return float("nan"), float("nan"), float("nan")
    evidence = nats_per_score * scores.astype(np.float64)
    return _position(evidence, nearness(utm_m, PLACE_RADIUS_M)[0], utm_m)


def _position(
    evidence: NDArray[np.float64], is_place: NDArray[np.bool_], utm_m: NDArray[np.float64]
) -> tuple[float, float, float]:
    """Mean position of the best answer's cluster, weighted by share, and its spread, in metres."""
    shares = np.exp(evidence[is_place] - evidence[is_place].max())
    shares /= shares.sum()
    metres = utm_m[is_place]
    mean_m = shares @ metres
    spread_m = np.sqrt(shares @ ((metres - mean_m) ** 2).sum(axis=1))
    return float(mean_m[0]), float(mean_m[1]), float(spread_m)


@dataclass(frozen=True)
class Decider:
    """A decision and the positions of the database photos, in metres (number of ids, 2), NaN where unknown."""

    decision: Decision
    utm_m: NDArray[np.float64]

    def decide(
        self,
        candidates: NDArray[np.int64],
        squared_distances: NDArray[np.float32],
        reranked: NDArray[np.int64],
        pair_scores: NDArray[np.float32],
    ) -> Decided:
        """The answer from candidates in order of distance; `reranked` (K,) has the first K with their pair scores."""
        score_of = dict(zip(reranked.tolist(), pair_scores.tolist(), strict=True))
        places: Sequence[int] = [place for place, image_id in enumerate(candidates.tolist()) if image_id in score_of]
        ids = candidates[places]
        scores = np.array([score_of[image_id] for image_id in ids.tolist()], np.float32)
        return decide(self.decision, ids, squared_distances[places], scores, self.utm_m[ids])
