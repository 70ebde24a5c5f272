"""Confidence of answers and early stopping, both fitted to queries with ground truth. Needs no torch.

A query's best pair score s is the sum of two logits. Its confidence is p = sigmoid((s - m) / (2 T)), with temperature T
and midpoint m. For a single pair the network's midpoint is 0; the best of K wrong candidates scores higher, and more so
for larger K. Early stopping is a threshold on `retrieval.early_stop.margin`, chosen by replaying a run that scored
everything.

Q queries, K candidates, R rounds of pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pairvpr.config.schema import DecisionRule, RerankConfig
from pairvpr.data import sealed
from pairvpr.data.claim import differences
from pairvpr.data.sealed import DamagedFileError
from pairvpr.errors import UserError
from pairvpr.retrieval.decision import Decision, Weights
from pairvpr.retrieval.early_stop import margin

FORMAT_VERSION = 2
OLDEST_FORMAT_VERSION = 1
"""This version has no decisions."""
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 100.0
NUM_HALVINGS = 60
FAR = 40.0
"""This far from its midpoint a sigmoid is 0 or 1."""
NUM_BINS = 10
NUM_THRESHOLDS = 101


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The result of `pairvpr calibrate` for one benchmark and network; docs/formats.md describes its file."""

    benchmark: str
    num_queries: int
    """The number of queries that it was fitted to."""
    num_candidates: int
    """K of that run."""
    model: dict[str, Any]
    """The section `model` of that run's settings."""
    first_stage: dict[str, Any] = field(default_factory=dict)
    """What `unlike_the_network` says of that run's descriptors."""
    temperature: float
    midpoint: float
    """Best pair score at which half of the answers are right."""
    round_size: int
    """Pairs per forward pass, after which a query may be finished; the threshold is valid only for this size."""
    stop_margin: float | None
    """A query is finished at this margin; None = no early stopping."""
    has_positions: bool = False
    """Whether the run's database photos had positions, which votes need."""
    fused: Decision | None = None
    """The decision by pair score and distance; None if the pair score carries no information."""
    consensus: Decision | None = None
    """The decision with votes; None without positions, or if votes do not improve the fit."""

    def content(self) -> dict[str, Any]:
        """The content of its file."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    def check(self, url: str, model: Mapping[str, Any], first_stage: Mapping[str, Any]) -> None:
        """Raise `UserError` unless a run's network and first stage are the calibrated ones.

        They are the section `model` of its settings, in which precisions may differ, and `unlike_the_network`.
        """
        for what, there, here in (("network", self.model, model), ("first stage", self.first_stage, first_stage)):
            name = what.replace("network", "model").replace(" ", "_")
            found = differences({name: there}, {name: here}, ("model.precision",))
            if found:
                raise UserError(
                    f"rerank.calibration={url}: it was made for another {what}: {'; '.join(found)}; "
                    f"expected a calibration of this {what} (pairvpr calibrate)"
                )

    def decision(self, url: str, rule: DecisionRule, num_candidates: int) -> Decision | None:
        """The decision for a run that re-ranks `num_candidates`; None for `pair`, which needs none.

        Raises `UserError` if the calibration has no such decision, or one for another number of candidates.
        """
        if rule is DecisionRule.pair:
            return None
        found = self.fused if rule is DecisionRule.fused else self.consensus
        if found is None:
            if self.fused is None:
                why = "has no decisions: it is of an earlier version, or its pair scores say nothing about who is right"
            elif not self.has_positions:
                why = "was made from a run whose photos have no positions, so nothing is known of votes"
            else:
                why = "has no votes: they did not prove themselves where it was made"
            raise UserError(
                f"rerank.decision={rule}: {url} {why}; expected another calibration, or one of "
                f"{', '.join(other for other in ('pair', self.fused and 'fused') if other)}"
            )
        if num_candidates != self.num_candidates:
            raise UserError(
                f"rerank.decision={rule}: {url} was made for {self.num_candidates} candidates, but "
                "rerank.num_candidates "
                f"is {num_candidates}; expected the same"
            )
        return found

    def check_rounds(self, url: str, round_size: int, decision: Decision | None = None) -> None:
        """Raise `UserError` unless the calibration has a stop margin for this decision and round size."""
        if (self.stop_margin if decision is None else decision.stop_margin) is None:
            raise UserError(
                f"rerank.adaptive=true: {url} has no stop margin (its run scored {self.num_candidates} "
                f"candidates in rounds of {self.round_size}); expected one calibrated on more candidates or max_loss"
            )
        if self.round_size != round_size:
            raise UserError(
                f"rerank.adaptive=true: {url} is for rounds of {self.round_size} pairs, but rerank.batch_size is "
                f"{round_size}; expected the same"
            )


def unlike_the_network(settings: Mapping[str, Any], reduced_to: int | None) -> dict[str, Any]:
    """How the descriptors of a run differ from those of the network that scores its pairs; empty where they don't.

    `settings` are the run's, or those of its first stage alone; an index with a reduction has `reduced_to` values.
    Distances between other descriptors mean other things, and so does their weight in a decision.
    """
    file_width = settings.get("descriptors", {}).get("width")
    found = {"file_width": file_width, "descriptor": settings.get("descriptor"), "reduced_to": reduced_to}
    return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Judge:
    """Computes the confidence of a run's answers, and whether each is above the threshold for "in this map"."""

    temperature: float
    midpoint: float = 0.0
    not_in_map_below: float | None = None

    def confidence(self, top_scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """(Q,) for best pair scores (Q,); NaN (no answer) stays NaN."""
        return probability(top_scores, self.temperature, self.midpoint).astype(np.float32)

    def in_map(self, confidence: NDArray[np.float32]) -> NDArray[np.bool_] | None:
        """(Q,) whether queries with these confidences (Q,) are in this map; None without a threshold."""
        return None if self.not_in_map_below is None else confidence.astype(np.float64) >= self.not_in_map_below


@dataclass(frozen=True)
class Rules:
    """How pair scores become answers: their order, their confidence, and when scoring stops early."""

    decision: Decision | None = None
    """None = the order of pair scores."""
    judge: Judge | None = None
    stop_margin: float | None = None

    @classmethod
    def of(cls, config: RerankConfig, calibration: Calibration | None) -> Rules:
        """Those of the settings. Raises `UserError` if the calibration lacks what they ask for."""
        if calibration is None:
            return cls()
        decision = decision_of(config, calibration)
        fitted = decision or calibration
        judge = Judge(fitted.temperature, fitted.midpoint, config.not_in_map_below)
        return cls(decision, judge, fitted.stop_margin if config.adaptive else None)

    @property
    def weights(self) -> Weights | None:
        """Those of the evidence, if it is more than the pair score."""
        return None if self.decision is None else self.decision.weights


def read_calibration(url: str) -> Calibration:
    """Read a calibration file (path or URL). Raises `UserError` if it is not one."""
    expected = "expected a file of pairvpr calibrate"
    try:
        content = sealed.read_json(url, expected)
    except UserError as error:
        raise UserError(f"rerank.calibration={error}") from error
    if content is None:
        raise UserError(f"rerank.calibration={url}: no such file; expected one from pairvpr calibrate")
    if "format_version" not in content:
        raise UserError(f"rerank.calibration={url}: not a calibration; expected a file from pairvpr calibrate")
    if content["format_version"] not in range(OLDEST_FORMAT_VERSION, FORMAT_VERSION + 1):
        raise UserError(
            f"rerank.calibration={url}: format version {content['format_version']}; expected "
            f"{OLDEST_FORMAT_VERSION} to {FORMAT_VERSION}"
        )
    try:
        return _parsed(content)
    except (KeyError, TypeError, ValueError, DamagedFileError) as error:
        raise UserError(f"rerank.calibration={url}: damaged; expected a file from pairvpr calibrate") from error


def calibrated(config: RerankConfig) -> Calibration | None:
    """The calibration for re-ranking. Raises `UserError` if it does not fit the settings."""
    if config.calibration is None:
        return None
    found = read_calibration(config.calibration)
    decision = decision_of(config, found)
    if config.adaptive:
        found.check_rounds(config.calibration, config.batch_size, decision)
    return found


def decision_of(config: RerankConfig, calibration: Calibration) -> Decision | None:
    """The decision for re-ranking. Raises `UserError` if the calibration has no such decision."""
    return calibration.decision(str(config.calibration), config.decision, config.num_candidates)


def check_positions_of_votes(decision: Decision | None, utm_m: NDArray[np.float64]) -> None:
    """Raise `UserError` for a decision with votes in a database (n, 2) of which no position is known (NaN)."""
    if decision is not None and decision.votes is not None and np.isnan(utm_m).all():
        raise UserError(
            f"rerank.decision={DecisionRule.consensus}: no database photo has a known position, and votes are between "
            "photos near each other; expected positions, or rerank.decision=fused"
        )


def _parsed(content: Mapping[str, Any]) -> Calibration:
    temperature, stop_margin = float(content["temperature"]), content["stop_margin"]
    found = Calibration(
        benchmark=str(content["benchmark"]),
        num_queries=int(content["num_queries"]),
        num_candidates=int(content["num_candidates"]),
        model=dict(content["model"]),
        first_stage=dict(content.get("first_stage", {})),
        temperature=temperature,
        midpoint=float(content["midpoint"]),
        round_size=int(content["round_size"]),
        stop_margin=None if stop_margin is None else float(stop_margin),
        **_decisions(content),
    )
    numbers = (temperature, found.midpoint, found.stop_margin or 0.0)
    if not all(math.isfinite(number) for number in numbers) or temperature <= 0 or found.round_size < 1:
        raise ValueError("out of range")
    return found


def _decisions(content: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that this version's file has in addition to earlier ones."""
    if content["format_version"] < FORMAT_VERSION:
        return {}
    if not isinstance(content["has_positions"], bool):
        raise TypeError("has_positions")
    decisions = {
        rule: None if content[rule] is None else sealed.parsed(Decision, content[rule], rule, "damaged")
        for rule in ("fused", "consensus")
    }
    for rule, decision in decisions.items():
        if decision is not None and (decision.votes is not None) != (rule == "consensus"):
            raise ValueError(rule)
    if decisions["consensus"] is not None and (decisions["fused"] is None or not content["has_positions"]):
        raise ValueError("consensus")
    return {"has_positions": content["has_positions"], **decisions}


def fit_temperature(top_scores: NDArray[np.float32], is_correct: NDArray[np.bool_]) -> float:
    """The maximum-likelihood T with midpoint 0, for best pair scores (Q,) and whether they are right (Q,).

    It lies between `LOWEST_TEMPERATURE` and `HIGHEST_TEMPERATURE`: the lowest if all scores above 0 are right and all
    below wrong, the highest if scores carry no or inverse information, or there are none.
    """
    logits, truth = np.asarray(top_scores, np.float64) / 2, np.asarray(is_correct, np.float64)
    return 1 / _likeliest_sharpness(lambda sharpness: float((logits * (_sigmoid(sharpness * logits) - truth)).sum()))


def fit_confidence(top_scores: NDArray[np.float32], is_correct: NDArray[np.bool_]) -> tuple[float, float]:
    """The maximum-likelihood temperature and midpoint for best pair scores (Q,) and whether they are right (Q,).

    The temperature has the bounds of `fit_temperature`: the lowest if a threshold separates right from wrong, the
    highest if scores carry no or inverse information (p is then the share of right answers, whatever the score). If all
    are right, or all wrong, the midpoint is undetermined: it is 0, and only the temperature is fitted.
    """
    if np.all(is_correct) or not np.any(is_correct):
        return fit_temperature(top_scores, is_correct), 0.0
    logits, truth = np.asarray(top_scores, np.float64) / 2, np.asarray(is_correct, np.float64)

    def shift(sharpness: float) -> float:
        """The likeliest midpoint, where the expected number of right answers is the actual one."""
        scaled = sharpness * logits
        return _zero_of(lambda x: float((truth - _sigmoid(scaled - x)).sum()), scaled.min() - FAR, scaled.max() + FAR)

    sharpness = _likeliest_sharpness(lambda a: float((logits * (_sigmoid(a * logits - shift(a)) - truth)).sum()))
    return 1 / sharpness, 2 * shift(sharpness) / sharpness


def _likeliest_sharpness(slope: Callable[[float], float]) -> float:
    """The minimizer 1 / T of the negative log-likelihood, which is convex in it and has this derivative."""
    log_low, log_high = -math.log(HIGHEST_TEMPERATURE), -math.log(LOWEST_TEMPERATURE)
    return math.exp(_zero_of(lambda log: slope(math.exp(log)), log_low, log_high))


def _zero_of(rising: Callable[[float], float], low: float, high: float) -> float:
    """The root of a non-decreasing function by bisection; the nearer end if it has none."""
    if rising(low) >= 0:
        return low
    if rising(high) <= 0:
        return high
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2


def probability(pair_scores: NDArray[np.float32], temperature: float, midpoint: float = 0.0) -> NDArray[np.float64]:
    """Probability of being right for best pair scores (Q,): sigmoid((score - midpoint) / (2 temperature))."""
    return _sigmoid((np.asarray(pair_scores, np.float64) - midpoint) / (2 * temperature))


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sigmoid without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * x))


@dataclass(frozen=True)
class Bin:
    """Answers with confidence in [low, high) (the last bin includes 1): mean confidence and share of right ones."""

    low: float
    high: float
    count: int
    mean_confidence: float | None
    share_correct: float | None


def reliability(confidence: NDArray[np.float64], is_correct: NDArray[np.bool_]) -> list[Bin]:
    """`NUM_BINS` bins of equal width over confidences (Q,) from 0 to 1; an empty bin has None."""
    bins = []
    place = np.minimum((np.asarray(confidence, np.float64) * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    for number in range(NUM_BINS):
        inside = place == number
        count = int(inside.sum())
        shares = (float(confidence[inside].mean()), float(is_correct[inside].mean())) if count else (None, None)
        bins.append(Bin(number / NUM_BINS, (number + 1) / NUM_BINS, count, *shares))
    return bins


def expected_calibration_error(bins: Sequence[Bin]) -> float | None:
    """Mean over all answers of |confidence - share of right ones| of their bin; None without answers."""
    num_answers = sum(found.count for found in bins)
    if num_answers == 0:
        return None
    gaps = (
        found.count * abs(found.mean_confidence - found.share_correct)
        for found in bins
        if found.mean_confidence is not None and found.share_correct is not None
    )
    return sum(gaps) / num_answers


@dataclass(frozen=True)
class ScoredQuery:
    """One query of a run that scored all its candidates, in retrieval order.

    Their pair scores (K,) float32, and which of them are positives (K,). Both are empty for a query photo that could
    not be read.
    """

    scores: NDArray[np.float32]
    is_positive: NDArray[np.bool_]

    @property
    def is_right(self) -> bool:
        """Whether the best answer is a positive."""
        return self.is_right_after(len(self.scores))

    def is_right_after(self, num_scored: int) -> bool:
        """The same query with only the first candidates scored."""
        return num_scored > 0 and bool(self.is_positive[int(self.scores[:num_scored].argmax())])


@dataclass(frozen=True)
class CurvePoint:
    """The effect of stopping at a margin: recall@1 in percent over all queries, and pairs scored per query."""

    stop_margin: float | None
    """None = everything is scored."""
    recall_at_1: float
    pairs_per_query: float


class Replay:
    """Replays early stopping in rounds of `round_size` pairs on a run that scored everything."""

    def __init__(self, queries: Sequence[ScoredQuery], round_size: int) -> None:
        longest = max((len(query.scores) for query in queries), default=0)
        ends = [*range(round_size, longest, round_size), longest]
        self._margins = np.full((len(queries), len(ends)), -np.inf)  # (Q, R) after each round
        self._pairs = np.zeros((len(queries), len(ends)), np.int64)
        self._right = np.zeros((len(queries), len(ends)), np.bool_)
        for row, query in enumerate(queries):
            for column, end in enumerate(ends):
                num_scored = min(end, len(query.scores))
                self._pairs[row, column] = num_scored
                self._right[row, column] = query.is_right_after(num_scored)
                if 0 < num_scored < len(query.scores):
                    self._margins[row, column] = margin(query.scores[:num_scored])

    def thresholds(self) -> list[float]:
        """At most `NUM_THRESHOLDS` margins to try, ascending; none if there is only one round."""
        found = self._margins[np.isfinite(self._margins)]
        return np.unique(np.quantile(found, np.linspace(0, 1, NUM_THRESHOLDS))).tolist() if len(found) else []

    def point(self, stop_margin: float | None) -> CurvePoint:
        """The point of the curve at one threshold."""
        stops = self._margins >= (np.inf if stop_margin is None else stop_margin)
        last = self._margins.shape[1] - 1
        column = np.where(stops.any(axis=1), stops.argmax(axis=1), last)
        rows = np.arange(len(column))
        return CurvePoint(
            stop_margin, 100 * float(self._right[rows, column].mean()), float(self._pairs[rows, column].mean())
        )

    def curve(self, thresholds: Sequence[float]) -> list[CurvePoint]:
        """One point per threshold, and the one without stopping."""
        return [self.point(threshold) for threshold in (*thresholds, None)]


def choose_margin(curve: Sequence[CurvePoint], max_loss: float) -> float | None:
    """The lowest threshold such that it and all higher ones lose at most `max_loss` points of recall@1, or None.

    `curve` is ascending; the point without stopping comes last.
    """
    full, chosen = curve[-1].recall_at_1, None
    for point in reversed(curve[:-1]):
        if full - point.recall_at_1 > max_loss + 1e-9:
            break
        chosen = point.stop_margin
    return chosen
