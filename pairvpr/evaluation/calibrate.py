"""The job calibrate: fits confidence, early stopping and decisions to a finished evaluation.

It fits to one half of the queries and reports on the other half. Needs neither torch nor Ray.
Q queries, K candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pairvpr.config.schema import CalibrateConfig
from pairvpr.data import sealed, storage
from pairvpr.data.claim import FILE as SETTINGS_FILE
from pairvpr.data.claim import check_writable_file
from pairvpr.errors import UserError
from pairvpr.evaluation.bootstrap import bootstrap_interval
from pairvpr.evaluation.compare import MeasuredRun, read_run
from pairvpr.evaluation.confidence import (
    Bin,
    Calibration,
    CurvePoint,
    Replay,
    choose_margin,
    expected_calibration_error,
    fit_confidence,
    fit_temperature,
    probability,
    reliability,
    unlike_the_network,
)
from pairvpr.evaluation.fit_decision import (
    Fit,
    LocatedQuery,
    decided_right,
    fit_consensus,
    fit_fused,
    fit_without,
    own_evidence,
)
from pairvpr.evaluation.predictions_file import read_predictions
from pairvpr.evaluation.run_index import photos_of_run
from pairvpr.retrieval.decision import Decision

NUM_BLOCKS = 20
FEWEST_QUERIES = 50
"""Answered queries required in each half."""
COLUMNS = ("candidates", "squared_distances", "reranked", "pair_scores", "positives")
NUM_PRINTED = 12
QUERIES_READ_AT_ONCE = 1024


@dataclass(frozen=True)
class _Half:
    """A subset of the queries; for the answered ones, the best pair scores (n,) and whether they are right (n,)."""

    queries: Sequence[LocatedQuery]
    top_scores: NDArray[np.float32]
    is_right: NDArray[np.bool_]


def calibrate(config: CalibrateConfig) -> dict[str, Any]:
    """Fit, print the quality of the fit, and publish the calibration file; returns its content (docs/formats.md).

    Raises `UserError` unless the run is a finished evaluation with ground truth that scored all pairs in both
    directions, with enough queries, some answered right and some wrong.
    """
    check_writable_file(config.output, "output", "the calibration as JSON")
    run = read_run(config.predictions)
    settings = _read_settings(config.predictions)
    utm_m = _positions(run, settings)
    queries = _read_queries(run, utm_m)
    is_held_out = held_out_queries(len(queries))
    fitted, held_out = (_half(queries, is_held_out == part, run.url) for part in (False, True))
    _check_both_kinds(fitted, run.url)

    round_size = int(settings["rerank"]["batch_size"])
    replay = Replay(fitted.queries, round_size)
    thresholds = replay.thresholds()
    temperature, midpoint = fit_confidence(fitted.top_scores, fitted.is_right)
    fits = _fit_decisions(fitted.queries, round_size, config.max_loss)
    found = Calibration(
        benchmark=run.metrics["benchmark"],
        num_queries=len(fitted.queries),
        num_candidates=run.metrics["num_candidates"],
        model=settings["model"],
        first_stage=settings["first_stage"],
        temperature=temperature,
        midpoint=midpoint,
        round_size=round_size,
        stop_margin=choose_margin(replay.curve(thresholds), config.max_loss),
        has_positions=utm_m is not None,
        **{rule: fit.decision for rule, fit in fits.items()},
    )
    held_out_content = _report(found, fitted, held_out, thresholds)
    held_out_content["decisions"] = {
        rule: decision_report(fit, fitted.queries, held_out.queries, round_size) for rule, fit in fits.items()
    }
    content = found.content() | {"max_loss": config.max_loss, "held_out": held_out_content}
    print("\n".join(_text(content, run.name)))
    try:
        sealed.write_json(config.output, content)
    except OSError as error:
        raise UserError(f"output={config.output}: can't be written: {storage.reason(error)}") from error
    return content


def _read_settings(url: str) -> dict[str, Any]:
    """The run's settings.json. Raises `UserError` if the run did not score all pairs in both directions."""
    settings_url = storage.join(url, SETTINGS_FILE)
    settings = sealed.read_json(settings_url, "expected the settings of an evaluation") or {}
    try:
        rerank = {**settings["rerank"]}
        model, round_size = {**settings["model"]}, int(rerank["batch_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{settings_url}: not the settings of an evaluation: {storage.reason(error)}") from error
    for name, partial in (
        ("rerank.adaptive=true", rerank.get("stop_margin") is not None),
        (f"rerank.second_direction={rerank.get('second_direction')}", rerank.get("second_direction") is not None),
    ):
        if partial:
            raise UserError(
                f"predictions={url}: the run had {name}; expected one that scored all pairs in both directions"
            )
    if rerank.get("candidates_sha256") is not None:
        raise UserError(
            f"predictions={url}: a run with rerank.candidates, whose distances nobody knows; expected one that "
            "searched an index"
        )
    if not model.get("weights_sha256") or round_size < 1:
        raise UserError(
            f"{settings_url}: it lacks the weights or the batch size; expected the settings of an evaluation"
        )
    first_stage = unlike_the_network(settings, settings.get("index_reduce_to"))
    return {**settings, "model": model, "rerank": rerank, "first_stage": first_stage}


def _positions(run: MeasuredRun, settings: Mapping[str, Any]) -> NDArray[np.float64] | None:
    """Positions in metres (number of ids, 2) of the index's photos; None if none is known or the index is gone.

    Raises `UserError` if there are only indices of other photos.
    """
    photos = photos_of_run(run.url, settings, run.protocol)
    return None if photos is None or not photos.has_positions else photos.utm_m


def _read_queries(run: MeasuredRun, utm_m: NDArray[np.float64] | None) -> list[LocatedQuery]:
    url = storage.join(run.url, "predictions.parquet")
    table = read_predictions(url, COLUMNS)
    try:
        batches = table.to_batches(QUERIES_READ_AT_ONCE)
        queries = [_scored(row, utm_m) for batch in batches for row in batch.to_pylist()]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{url}: not the predictions of a run: {storage.reason(error)}") from error
    expected = run.protocol.get("num_queries")
    if len(queries) != expected:
        raise UserError(
            f"{url}: {len(queries)} queries, but {expected} in metrics.json; expected files of the same run"
        )
    return queries


def _scored(row: Mapping[str, Any], utm_m: NDArray[np.float64] | None) -> LocatedQuery:
    """One row of predictions.parquet, in retrieval order."""
    score_of = dict(zip(row["reranked"], row["pair_scores"], strict=True))
    ids = row["candidates"][: len(score_of)]
    scores = np.array([score_of[image_id] for image_id in ids], np.float32)
    if not np.isfinite(scores).all():
        raise ValueError("a pair score is not finite")
    distances = np.array(row["squared_distances"][: len(ids)], np.float32)
    if not np.isfinite(distances).all():
        raise ValueError("a squared distance is not finite")
    ids = np.array(ids, np.int64)
    return LocatedQuery(
        scores=scores,
        is_positive=np.isin(ids, np.array(row["positives"], np.int64)),
        squared_distances=distances,
        utm_m=np.full((len(ids), 2), np.nan) if utm_m is None else utm_m[ids],
    )


def held_out_queries(num_queries: int) -> NDArray[np.bool_]:
    """(Q,) whether a query is held out: every other one of `NUM_BLOCKS` blocks of consecutive ids.

    Neighbouring queries are often frames of one drive. Blocks separate only those at their borders, and both halves
    come from all over the list.
    """
    return np.arange(num_queries) * NUM_BLOCKS // max(1, num_queries) % 2 == 1


def _half(queries: Sequence[LocatedQuery], is_chosen: NDArray[np.bool_], url: str) -> _Half:
    """The chosen queries (Q,). Raises `UserError` if too few of them were answered."""
    chosen = [query for query, its in zip(queries, is_chosen, strict=True) if its]
    answered = [query for query in chosen if len(query.scores)]
    if len(answered) < FEWEST_QUERIES:
        raise UserError(
            f"predictions={url}: only {len(answered)} queries were answered in one half of the {len(queries)}; "
            f"expected {FEWEST_QUERIES} or more in each"
        )
    return _Half(
        chosen,
        np.array([query.scores.max() for query in answered], np.float32),
        np.array([query.is_right for query in answered], np.bool_),
    )


def _check_both_kinds(fitted: _Half, url: str) -> None:
    """Raise `UserError` if all answers are right, or all wrong: any temperature would be a guess."""
    if fitted.is_right.all() or not fitted.is_right.any():
        raise UserError(
            f"predictions={url}: the best answers to all {len(fitted.is_right)} queries in the fitted half are "
            f"{'right' if fitted.is_right.all() else 'wrong'}; expected both right and wrong ones"
        )


def _report(found: Calibration, fitted: _Half, held_out: _Half, thresholds: Sequence[float]) -> dict[str, Any]:
    """The report's entry on the calibration of held-out queries."""
    alone = fit_temperature(fitted.top_scores, fitted.is_right)
    tables = {
        name: reliability(probability(held_out.top_scores, temperature, midpoint), held_out.is_right)
        for name, temperature, midpoint in (
            ("before", 1.0, 0.0),
            ("temperature_alone", alone, 0.0),
            ("after", found.temperature, found.midpoint),
        )
    }
    replay = Replay(held_out.queries, found.round_size)
    return {
        "num_queries": len(held_out.queries),
        **{
            name: {
                "expected_calibration_error": expected_calibration_error(bins),
                "reliability": [asdict(row) for row in bins],
            }
            for name, bins in tables.items()
        },
        "at_stop_margin": asdict(replay.point(found.stop_margin)),
        "curve": [asdict(point) for point in replay.curve(thresholds)],
    }


def _fit_decisions(queries: Sequence[LocatedQuery], round_size: int, max_loss: float) -> dict[str, Fit]:
    """The available decisions by rule, each with its stop margin of evidence."""
    fused = fit_fused(queries)
    if fused is None:
        return {}
    consensus = fit_consensus(queries, fused)
    replay = Replay([own_evidence(fused.decision, query) for query in queries], round_size)
    stop_margin = choose_margin(replay.curve(replay.thresholds()), max_loss)
    return {
        rule: replace(fit, decision=replace(fit.decision, stop_margin=stop_margin))
        for rule, fit in (("fused", fused), ("consensus", consensus))
        if fit is not None
    }


def decision_report(
    fit: Fit, fitted: Sequence[LocatedQuery], held_out: Sequence[LocatedQuery], round_size: int
) -> dict[str, Any]:
    """The report's entry on a decision for held-out queries, and on the gain from each of its terms.

    Differences in recall@1 are paired by query, in points, with a 95 % bootstrap interval.
    """
    answered = [query for query in held_out if len(query.scores)]
    found = [decided_right(fit.decision, query) for query in answered]
    bins = reliability(
        probability(np.array([odds for _, odds in found], np.float32), fit.decision.temperature, fit.decision.midpoint),
        np.array([is_right for is_right, _ in found]),
    )
    is_right = right_by(fit.decision, held_out)
    replay = Replay([own_evidence(fit.decision, query) for query in held_out], round_size)
    return {
        "terms": list(fit.terms),
        "log_likelihood": fit.log_likelihood,
        "recall_at_1": 100 * float(is_right.mean()),
        "more_than_pair": _points(is_right, np.array([query.is_right for query in held_out])),
        "more_than_without": {
            term: _points(is_right, right_by(fit_without(fitted, fit, term).decision, held_out)) for term in fit.terms
        },
        "expected_calibration_error": expected_calibration_error(bins),
        "reliability": [asdict(row) for row in bins],
        "curve": [asdict(point) for point in replay.curve(replay.thresholds())],
    }


def right_by(decision: Decision, queries: Sequence[LocatedQuery]) -> NDArray[np.bool_]:
    """(Q,) whether the best answers are positives."""
    return np.array([decided_right(decision, query)[0] for query in queries], np.bool_)


def _points(after: NDArray[np.bool_], before: NDArray[np.bool_]) -> dict[str, float]:
    """The gain in points of recall@1, with its interval."""
    interval = bootstrap_interval(after.astype(np.float64) - before.astype(np.float64))
    return {"points": 100 * interval.mean, "low": 100 * interval.low, "high": 100 * interval.high}


def _decision_text(content: Mapping[str, Any]) -> list[str]:
    """The decisions as lines of text."""
    lines: list[str] = []
    for rule, found in content["held_out"]["decisions"].items():
        lines += [
            "",
            f"rerank.decision={rule}: recall@1 {found['recall_at_1']:.1f}, expected calibration error "
            f"{found['expected_calibration_error']:.3f}",
            f"{'recall@1 more than that of':<36}{'points':>8}   95 % interval",
            f"{'the pair score alone':<36}{_gain(found['more_than_pair'])}",
            *(f"{f'this without {term}':<36}{_gain(points)}" for term, points in found["more_than_without"].items()),
        ]
    if not lines:
        return ["", "no decision: the pair scores say nothing about which candidate is right"]
    if content["consensus"] is None:
        why = "votes do not prove themselves" if content["has_positions"] else "no position of a photo is known"
        lines += ["", f"rerank.decision=consensus: none, {why}"]
    return lines


def _gain(points: Mapping[str, float]) -> str:
    return f"{points['points']:>+8.1f}   {points['low']:+.1f} to {points['high']:+.1f}"


def _evidence_curve(decisions: Mapping[str, Any]) -> list[str]:
    """The curve of stopping by evidence; it is the same with and without votes."""
    if "fused" not in decisions:
        return []
    return ["by the evidence of rerank.decision=fused and consensus:", *_curve_table(decisions["fused"]["curve"])]


def _curve_table(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Recall against pairs scored, for some of the margins; scoring everything comes last."""
    curve = [CurvePoint(**row) for row in points]
    shown = [curve[i] for i in np.unique(np.linspace(0, len(curve) - 2, NUM_PRINTED - 1).astype(int))]
    return [
        f"{'margin':<12}{'recall@1':>10}{'pairs':>10}",
        *(
            f"{'none' if point.stop_margin is None else f'{point.stop_margin:.3f}':<12}{point.recall_at_1:>10.1f}"
            f"{point.pairs_per_query:>10.1f}"
            for point in dict.fromkeys([*shown, curve[-1]])
        ),
    ]


def _text(content: Mapping[str, Any], name: str) -> list[str]:
    """The content of the file as text."""
    held_out = content["held_out"]
    curve = [CurvePoint(**row) for row in held_out["curve"]]
    chosen, full = CurvePoint(**held_out["at_stop_margin"]), curve[-1]
    lines = [
        f"{content['benchmark']}: fitted to {content['num_queries']:,} queries, the rest is about "
        f"{held_out['num_queries']:,} others of {name}",
        "",
        f"temperature {content['temperature']:.3f}, midpoint {content['midpoint']:.3f}: expected calibration error "
        + ", ".join(
            f"{held_out[name]['expected_calibration_error']:.3f} {name.replace('_', ' ')}"
            for name in ("before", "temperature_alone", "after")
        ),
        *(line for name in ("before", "after") for line in ("", f"{name}:", *reliability_table(held_out[name]))),
        *_decision_text(content),
        "",
    ]
    if chosen.stop_margin is None:
        why = "one round scores all candidates" if len(curve) == 1 else f"all lose more than {content['max_loss']}"
        return [*lines, f"no margin to stop at: {why}"]
    return [
        *lines,
        f"stopping at margin {chosen.stop_margin:.3f}, rounds of {content['round_size']}: recall@1 "
        f"{chosen.recall_at_1:.1f} with {chosen.pairs_per_query:.1f} pairs a query, {full.recall_at_1:.1f} with all "
        f"{full.pairs_per_query:.1f}",
        *_curve_table(held_out["curve"]),
        *_evidence_curve(held_out["decisions"]),
    ]


def reliability_table(found: Mapping[str, Any]) -> list[str]:
    """The non-empty bins of an entry `reliability`, as lines of text."""
    bins = [Bin(**row) for row in found["reliability"]]
    return [
        f"{'confidence':<14}{'queries':>9}{'mean':>9}{'right':>9}",
        *(
            f"{f'{row.low:.1f} to {row.high:.1f}':<14}{row.count:>9,}"
            f"{row.mean_confidence:>9.3f}{row.share_correct:>9.3f}"
            for row in bins
            if row.count
        ),
    ]
