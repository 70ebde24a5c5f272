"""Fits the decisions of `retrieval.decision` to queries with ground truth. Needs only numpy.

The likelihood of a query is the total share of its positives, or the share of "none of them" if no candidate is a
positive. A term is included if it raises the log-likelihood by more than its number of parameters (Akaike's criterion).
Weights have a weak normal prior, so that terms that separate right from wrong perfectly stay finite.

Q queries, K candidates (the maximum over queries), F terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pairvpr.evaluation.confidence import ScoredQuery, fit_confidence
from pairvpr.retrieval.decision import Decision, Votes, Weights, decide, log_share_near, nearness

PRIOR_SD = 10.0
"""Standard deviation of the prior on weights of terms of unit spread."""
NUM_STEPS = 300
SMALLEST_STEP, SMALLEST_GAIN = 1e-9, 1e-8
PAIR_SCORE = "pair_score"
OWN_TERMS = (PAIR_SCORE, "squared_distance", "log_rank")
"""The optional terms: fields of `Weights`."""
VOTES_TERM = "votes"
RADII_M = (10.0, 25.0, 50.0)
SOFTNESSES = (1.0, 0.5, 0.35, 0.25, 0.15)
NUM_VOTE_PARAMETERS = 3
"""Parameters of votes: weight, radius and softness."""


@dataclass(frozen=True)
class LocatedQuery(ScoredQuery):
    """A scored query with the other inputs of a decision, in retrieval order."""

    squared_distances: NDArray[np.float32]
    """(K,)"""
    utm_m: NDArray[np.float64]
    """(K, 2) metres east and north; NaN where unknown."""


@dataclass(frozen=True)
class Fit:
    """A fitted decision: its terms, and the log-likelihood of the queries that it was fitted to."""

    decision: Decision
    terms: tuple[str, ...]
    log_likelihood: float


def fit_fused(queries: Sequence[LocatedQuery]) -> Fit | None:
    """The decision without votes: the pair score and the other terms that improve the fit.

    None if the pair score carries no or inverse information.
    """
    known = _Stacked(queries)
    chosen = _fit_own(known, (PAIR_SCORE,))
    if chosen.decision.weights.pair_score == 0:
        return None
    while True:
        wider = [_fit_own(known, (*chosen.terms, term)) for term in OWN_TERMS if term not in chosen.terms]
        wider = [fit for fit in wider if all(getattr(fit.decision.weights, term) > 0 for term in fit.terms)]
        best = max(wider, key=lambda fit: fit.log_likelihood, default=chosen)
        if best.log_likelihood - chosen.log_likelihood <= 1:
            return _with_confidence(chosen, known.queries)
        chosen = best


def fit_consensus(queries: Sequence[LocatedQuery], fused: Fit) -> Fit | None:
    """A fused decision with votes added; None if no position is known, or votes do not improve the fit."""
    known = _Stacked(queries)
    if not known.has_positions:
        return None
    found = _fit_votes(known, fused)
    if found.decision.votes is None or found.log_likelihood - fused.log_likelihood <= NUM_VOTE_PARAMETERS:
        return None
    return _with_confidence(found, known.queries)


def fit_without(queries: Sequence[LocatedQuery], fit: Fit, term: str) -> Fit:
    """The same decision refitted without one of its terms."""
    known = _Stacked(queries)
    left = _fit_own(known, [its for its in fit.terms if its not in (term, VOTES_TERM)])
    return left if term == VOTES_TERM or fit.decision.votes is None else _fit_votes(known, left)


def decided_right(decision: Decision, query: LocatedQuery) -> tuple[bool, float]:
    """Whether the best answer to a query is a positive, and its log odds before calibration."""
    places = np.arange(len(query.scores))
    found = decide(decision, places, query.squared_distances, query.scores, query.utm_m)
    return bool(len(places)) and bool(query.is_positive[found.ids[0]]), found.log_odds


def own_evidence(decision: Decision, query: LocatedQuery) -> ScoredQuery:
    """The query with its candidates' own evidence as scores, which early stopping uses."""
    weights = decision.weights
    evidence = weights.evidence(query.scores, weights.prior(query.squared_distances))
    return ScoredQuery(evidence.astype(np.float32), query.is_positive)


class _Stacked:
    """The queries with candidates, as arrays (Q, K); padding is marked by `is_candidate`."""

    def __init__(self, asked: Sequence[LocatedQuery]) -> None:
        self.queries = queries = [query for query in asked if len(query.scores)]
        lengths = np.array([len(query.scores) for query in queries])
        self.is_candidate = np.arange(lengths.max()) < lengths[:, None]
        self.is_positive = self.padded([query.is_positive.astype(np.float64) for query in queries]) > 0
        self.has_positions = not all(np.isnan(query.utm_m).any(axis=1).all() for query in queries)
        self.values = {
            "pair_score": self.padded([query.scores.astype(np.float64) for query in queries]),
            "squared_distance": -self.padded([query.squared_distances.astype(np.float64) for query in queries]),
            "log_rank": self.padded([-np.log1p(np.arange(length)) for length in lengths]),
        }

    def padded(self, rows: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        """(Q, K) from a row for each query, zeros behind it."""
        found = np.zeros(self.is_candidate.shape)
        found[self.is_candidate] = np.concatenate(rows)
        return found


@dataclass(frozen=True)
class _Likeliest:
    weights: list[float]
    nothing: float
    log_likelihood: float


def _fit_own(known: _Stacked, terms: Sequence[str]) -> Fit:
    """A decision with these terms; a term with the wrong sign gets the weight 0."""
    values = [known.values[term] for term in terms]
    features = np.stack(values, axis=-1) if values else np.empty((*known.is_candidate.shape, 0))
    found = _most_likely(features, known.is_candidate, known.is_positive)
    weights = dict.fromkeys(OWN_TERMS, 0.0) | dict(zip(terms, found.weights, strict=True))
    return Fit(_unjudged(Weights(**weights), None, found.nothing), tuple(terms), found.log_likelihood)


def _fit_votes(known: _Stacked, fused: Fit) -> Fit:
    """The decision with the likeliest votes; unchanged if they get no weight."""
    weights, best = fused.decision.weights, fused
    own = [weights.evidence(query.scores, weights.prior(query.squared_distances)) for query in known.queries]
    for radius_m in RADII_M:
        log_votes = [_log_votes(query, its, radius_m) for query, its in zip(known.queries, own, strict=True)]
        for number, softness in enumerate(SOFTNESSES):
            features = np.stack([known.padded(own), known.padded([its[number] for its in log_votes])], axis=-1)
            found = _most_likely(features, known.is_candidate, known.is_positive)
            if found.weights[1] > 0 and found.log_likelihood > best.log_likelihood:
                votes = Votes(radius_m=radius_m, softness=softness, own=found.weights[0], weight=found.weights[1])
                decision = _unjudged(weights, votes, found.nothing)
                best = Fit(decision, (*fused.terms, VOTES_TERM), found.log_likelihood)
    return best


def _log_votes(query: LocatedQuery, own: NDArray[np.float64], radius_m: float) -> list[NDArray[np.float64]]:
    """For each of `SOFTNESSES`, the log share of votes (K,) of a query's candidates."""
    is_near = nearness(query.utm_m, radius_m)
    return [log_share_near(softness, own, is_near) for softness in SOFTNESSES]


def _unjudged(weights: Weights, votes: Votes | None, nothing: float) -> Decision:
    return Decision(weights=weights, votes=votes, nothing=nothing, temperature=1.0, midpoint=0.0, stop_margin=None)


def _with_confidence(fit: Fit, queries: Sequence[LocatedQuery]) -> Fit:
    """The same decision with its log odds calibrated on the same queries."""
    answers = [decided_right(fit.decision, query) for query in queries]
    temperature, midpoint = fit_confidence(
        np.array([odds for _, odds in answers], np.float32), np.array([is_right for is_right, _ in answers])
    )
    return replace(fit, decision=replace(fit.decision, temperature=temperature, midpoint=float(midpoint)))


def _most_likely(
    features: NDArray[np.float64], is_candidate: NDArray[np.bool_], is_positive: NDArray[np.bool_]
) -> _Likeliest:
    """Non-negative weights (F,) of features (Q, K, F), and the evidence of "none of them", by Newton's method.

    A term whose weight would be negative gets 0. The returned log-likelihood excludes the prior.
    """
    spread = np.maximum(features[is_candidate].std(axis=0), 1e-12)
    centre = features[is_candidate].mean(axis=0)
    num_terms = features.shape[-1]
    design = np.zeros((len(features), features.shape[1] + 1, num_terms + 1))
    design[:, :-1, :num_terms] = (features - centre) / spread
    design[:, -1, num_terms] = 1  # "none of them"
    allowed = np.concatenate([is_candidate, np.ones((len(features), 1), np.bool_)], axis=1)
    right = is_positive & is_candidate
    right = np.concatenate([right, ~right.any(axis=1, keepdims=True)], axis=1)
    is_free = np.ones(num_terms + 1, np.bool_)
    while True:
        found = _ascent(design * is_free, allowed, right)
        below = np.flatnonzero(is_free[:num_terms] & (found[:num_terms] < 0))
        if not len(below):
            break
        is_free[below] = False
    weights = found[:num_terms] / spread
    return _Likeliest(
        weights.tolist(), float(found[num_terms] + weights @ centre), _log_likelihood(design, found, allowed, right)[0]
    )


def _ascent(design: NDArray[np.float64], allowed: NDArray[np.bool_], right: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The likeliest weights (F + 1,) of a design (Q, K + 1, F + 1), starting from 0; no step lowers the likelihood."""
    found = np.zeros(design.shape[-1])

    def objective(weights: NDArray[np.float64]) -> float:
        return _log_likelihood(design, weights, allowed, right)[0] - (weights**2).sum() / (2 * PRIOR_SD**2)

    value = objective(found)
    for _ in range(NUM_STEPS):
        _, of_all, of_right = _log_likelihood(design, found, allowed, right)
        (mean_of_all, spread_of_all), (mean_of_right, spread_of_right) = (
            _moments(design, shares) for shares in (of_all, of_right)
        )
        slope = mean_of_right - mean_of_all - found / PRIOR_SD**2
        prior = np.eye(len(found)) / PRIOR_SD**2
        curvature = spread_of_all - spread_of_right + prior
        if np.linalg.eigvalsh(curvature)[0] <= 0:  # not convex here, but this part always is
            curvature = spread_of_all + prior
        step = np.linalg.solve(curvature, slope)
        while (gained := objective(found + step) - value) < 0 and np.abs(step).max() > SMALLEST_STEP:
            step = step / 2
        if gained < SMALLEST_GAIN:
            break
        found, value = found + step, value + gained
    return found


def _moments(
    design: NDArray[np.float64], shares: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means (F + 1,) and covariances (F + 1, F + 1) of a design under shares (Q, K + 1), summed over the queries."""
    means = (shares[:, None, :] @ design)[:, 0]
    weighted = (design * np.sqrt(shares)[:, :, None]).reshape(-1, design.shape[-1])
    return means.sum(axis=0), weighted.T @ weighted - means.T @ means


def _log_likelihood(
    design: NDArray[np.float64], weights: NDArray[np.float64], allowed: NDArray[np.bool_], right: NDArray[np.bool_]
) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """Sum over queries, the shares (Q, K + 1) of all entries, and those of the right ones among themselves."""
    evidence = design @ weights
    shares, logs = [], []
    for which in (allowed, right):
        masked = np.where(which, evidence, -np.inf)
        highest = masked.max(axis=1, keepdims=True)
        raised = np.exp(masked - highest)
        total = raised.sum(axis=1, keepdims=True)
        shares.append(raised / total)
        logs.append(highest[:, 0] + np.log(total[:, 0]))
    return float((logs[1] - logs[0]).sum()), shares[0], shares[1]
