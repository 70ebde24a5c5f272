"""How well confidence, "not in this map" and early stopping carry over from one city to others.

    python -m benchmarks.confidence --report

Run it by hand from the root of the checkout; it takes some minutes on two cores. The small network is calibrated on one
toy city and tested on others, none of them seen in its training. The map holds the photos of most places only: queries
from the rest have no positive, and "not in this map" is the right answer to them.

Three margins are compared: the best pair score of those scored so far, the best less the second best, and the best less
the median. A query counts as lost that is right if everything is scored and wrong with early stopping.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import shared
from pairvpr.config.compose import load
from pairvpr.config.schema import EvaluateConfig
from pairvpr.data.benchmarks import load_benchmark
from pairvpr.distributed.progress import say
from pairvpr.evaluation.confidence import (
    Replay,
    ScoredQuery,
    choose_margin,
    expected_calibration_error,
    fit_confidence,
    fit_temperature,
    probability,
    reliability,
)
from pairvpr.models.weights import build_model, load_weights
from pairvpr.retrieval import pipeline
from pairvpr.retrieval.early_stop import margin
from pairvpr.toy import city as toy_city

WHAT = "confidence"
WIDTH_PX, HEIGHT_PX = 320, 240
BELOW = (0.3, 0.5, 0.7)
PAIRS = (10, 20, 30, 40)
ROUND_SIZES = (4, 8, 16)
MAX_LOSS = 0.1


def best_less_second(scores: NDArray[np.float32]) -> float:
    """0 of a single score."""
    highest = np.sort(scores)[::-1]
    return float(highest[0] - highest[1]) if len(highest) > 1 else 0.0


def best_less_median(scores: NDArray[np.float32]) -> float:
    """0 of a single score."""
    return float(scores.max() - np.median(scores))


MARGINS = {"best": margin, "best - second": best_less_second, "best - median": best_less_median}


@dataclass(frozen=True)
class City:
    """One city's queries, and which of them have a positive in the map (Q,)."""

    seed: int
    queries: list[ScoredQuery]
    has_positive: NDArray[np.bool_]

    @property
    def top_scores(self) -> NDArray[np.float32]:
        """(Q,)"""
        return np.array([query.scores.max() for query in self.queries])

    @property
    def is_right(self) -> NDArray[np.bool_]:
        """(Q,)"""
        return np.array([query.is_right for query in self.queries])


def run(folder: Path, seed: int, options: argparse.Namespace) -> City:
    """Draw a city and re-rank all its queries in full."""
    places = options.places + options.unknown
    for part, photos in (
        ("database", toy_city.database_photos(seed=seed, num_places=options.places)),
        ("queries", toy_city.query_photos(seed=seed, num_places=places)),
    ):
        (folder / part).mkdir(parents=True)
        for photo in photos:
            toy_city.draw(photo, width_px=WIDTH_PX, height_px=HEIGHT_PX).save(folder / part / photo.path, quality=90)
    line = ["benchmark=folders", f"benchmark.database={folder}/database", f"benchmark.queries={folder}/queries"]
    line += ["benchmark.radius_m=25", f"output={folder}", f"rerank.num_candidates={options.candidates}"]
    config = load(EvaluateConfig, [*line, "index.num_retrieved=1", "describe.batch_size=32"])
    benchmark = load_benchmark(config.benchmark, config.output)
    assert benchmark.positives is not None
    model = build_model(config.model, load_weights(config.model), torch.device("cpu"))
    queries = []
    for answer, positives in zip(pipeline.run(benchmark, model, config), benchmark.positives, strict=True):
        score_of = dict(zip(answer.reranked.tolist(), answer.pair_scores, strict=True))
        scores = np.array([score_of[image_id] for image_id in answer.candidates.tolist()], np.float32)
        queries.append(ScoredQuery(scores, np.isin(answer.candidates, positives)))
    found = City(seed, queries, np.array([len(positives) > 0 for positives in benchmark.positives]))
    say(f"city {seed}: recall@1 {100 * found.is_right.mean():.1f}")
    return found


def calibration_rows(fitted: City, tested: Sequence[City]) -> list[list[str]]:
    """Expected calibration errors with no calibration, the temperature alone, temperature and midpoint."""
    fits = ((1.0, 0.0), (fit_temperature(fitted.top_scores, fitted.is_right), 0.0), _fit(fitted))
    rows = []
    for city in tested:
        errors = [
            expected_calibration_error(reliability(probability(city.top_scores, *fit), city.is_right)) for fit in fits
        ]
        right = f"{100 * city.is_right.mean():.1f}"
        rows.append([f"city {city.seed}", f"{len(city.queries):,}", right, *(f"{error:.3f}" for error in errors)])
    return rows


def _fit(city: City) -> tuple[float, float]:
    return fit_confidence(city.top_scores, city.is_right)


def refusal_rows(fitted: City, tested: City) -> list[list[str]]:
    """What "not in this map" does at some probabilities."""
    confidence = probability(tested.top_scores, *_fit(fitted))
    rows = []
    for below in BELOW:
        in_map = confidence >= below
        shares = (
            tested.is_right[in_map],
            ~in_map[~tested.has_positive],
            ~in_map[tested.has_positive],
            ~in_map[tested.is_right],
        )
        rows.append([str(below), f"{in_map.sum():,}", *(f"{100 * flags.mean():.1f}" for flags in shares)])
    return rows


def margin_rows(queries: Sequence[ScoredQuery]) -> list[list[str]]:
    """Percent of the queries that are lost at some numbers of pairs a query, for each margin and size of round."""
    rows = []
    for round_size in ROUND_SIZES:
        for name, rule in MARGINS.items():
            pairs, lost = np.array(_curve(queries, round_size, rule)).T
            cells = [f"{np.interp(number, pairs, lost):.2f}" if number >= pairs[0] else "-" for number in PAIRS]
            rows.append([name, str(round_size), *cells])
    return rows


def _curve(
    queries: Sequence[ScoredQuery], round_size: int, rule: Callable[[NDArray[np.float32]], float]
) -> list[tuple[float, float]]:
    """(pairs a query, percent lost) for ascending thresholds."""
    ends = [[*range(round_size, len(query.scores), round_size), len(query.scores)] for query in queries]
    margins = [
        [rule(query.scores[:end]) for end in its[:-1]] + [np.inf] for query, its in zip(queries, ends, strict=True)
    ]
    curve = []
    for threshold in np.quantile([value for its in margins for value in its[:-1]], np.linspace(0, 1, 101)):
        stops = [its[int(np.argmax(np.array(row) >= threshold))] for its, row in zip(ends, margins, strict=True)]
        lost = [query.is_right and not query.is_right_after(end) for query, end in zip(queries, stops, strict=True)]
        curve.append((float(np.mean(stops)), 100 * float(np.mean(lost))))
    return curve


def stopping_rows(fitted: City, tested: City) -> list[list[str]]:
    """The margin calibrated on one city, used on others: recall@1 and pairs a query, against scoring everything."""
    rows = []
    for round_size in ROUND_SIZES:
        replay = Replay(fitted.queries, round_size)
        chosen = choose_margin(replay.curve(replay.thresholds()), MAX_LOSS)
        there = Replay(tested.queries, round_size)
        points = [there.point(stop_margin) for stop_margin in (chosen, None)]
        cells = [f"{value:.1f}" for point in points for value in (point.recall_at_1, point.pairs_per_query)]
        rows.append([str(round_size), "none" if chosen is None else f"{chosen:.2f}", *cells])
    return rows


def report(fitted: City, tested: Sequence[City], options: argparse.Namespace, load_at_start: float) -> str:
    """All tables as Markdown."""
    together = City(
        -1,
        [query for city in tested for query in city.queries],
        np.concatenate([city.has_positive for city in tested]),
    )
    temperature, midpoint = _fit(fitted)
    return f"""# Confidence, "not in this map", and stopping early

The small network, calibrated on city {fitted.seed} (temperature {temperature:.3f}, midpoint {midpoint:.3f}), tested on
others. Each city: {options.places} places in the map, 3 photos each; a query from each of them and from
{options.unknown} places that are not in the map; {options.candidates} candidates.

{confidence_text(fitted, tested, together)}

{stopping_text(fitted, together, options.candidates)}

{shared.circumstances(WHAT, load_at_start)}"""


def confidence_text(fitted: City, tested: Sequence[City], together: City) -> str:
    """How far the calibrated confidence can be trusted, and what it refuses."""
    errors = shared.markdown_table(
        ("test", "queries", "recall@1", "as it is", "temperature alone", "temperature and midpoint"),
        calibration_rows(fitted, tested),
    )
    temperature, midpoint = _fit(fitted)
    bins = shared.markdown_table(
        ("confidence", "queries", "mean", "right"),
        [
            [
                f"{row.low:.1f} to {row.high:.1f}",
                f"{row.count:,}",
                f"{row.mean_confidence:.3f}",
                f"{row.share_correct:.3f}",
            ]
            for row in reliability(probability(together.top_scores, temperature, midpoint), together.is_right)
            if row.count
        ],
    )
    refusals = shared.markdown_table(
        ("below", "answered", "right", "refused without", "refused with", "refused right ones"),
        refusal_rows(fitted, together),
    )
    return f"""Expected calibration error (10 bins) of the best answers:

{errors}

Reliability of all tested cities together, with temperature and midpoint:

{bins}

"Not in this map" below a confidence, in percent: of the queries that are answered, how many are right; how many are
refused of those without a positive, of those with one, of those that would have been answered rightly:

{refusals}"""


def stopping_text(fitted: City, together: City, num_candidates: int) -> str:
    """Which margin tells best when to stop, and what stopping there loses."""
    margins = shared.markdown_table(
        ("margin", "round", *(f"{number} pairs" for number in PAIRS)),
        margin_rows([*fitted.queries, *together.queries]),
    )
    stopped = shared.markdown_table(
        ("round", "margin", "recall@1, early", "pairs, early", "recall@1, all", "pairs, all"),
        stopping_rows(fitted, together),
    )
    return f"""Which margin: percent of queries lost (right if all {num_candidates} are scored, wrong with early
stopping) at so many pairs scored a query, interpolated, all cities:

{margins}

The best score as the margin, its threshold chosen on city {fitted.seed} to lose at most {MAX_LOSS} points of recall@1,
on the tested cities:

{stopped}"""


def main() -> None:
    """One city to calibrate on, then those to test on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13, 14], help="cities (11 12 13 14)")
    parser.add_argument("--places", type=int, default=350, help="places of each city in the map (350)")
    parser.add_argument("--unknown", type=int, default=150, help="places with a query that are not in it (150)")
    parser.add_argument("--candidates", type=int, default=50, help="candidates re-ranked (50)")
    shared.add_report_option(parser, WHAT)
    options = parser.parse_args()
    load_at_start = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        cities = [run(Path(folder) / str(seed), seed, options) for seed in options.seeds]
    shared.publish(WHAT, report(cities[0], cities[1:], options, load_at_start), options.report)


if __name__ == "__main__":
    main()
