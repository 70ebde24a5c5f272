"""How well a decision carries over from one city to others: recall, confidence, positions, pairs that need scoring.

    python -m benchmarks.decision --keep DIR --report

Run it by hand from the root of the checkout; it takes some minutes for each city on two cores. The small network
re-ranks 100 candidates of every query of some toy cities, none of them seen in its training. One half of the first
city's queries is what decisions are fitted to, for each number of candidates anew; nothing of the other cities is.
`--keep` keeps each city's scores, so that the report can be made again without them being computed again.

`--corridor DIR` does the same on real photos of a corridor, whose positions are not known: a folder with database/,
queries/ and ground_truth.csv.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import shared
from benchmarks.shared import markdown_table as table
from pairvpr.config.compose import load
from pairvpr.config.schema import EvaluateConfig
from pairvpr.data.benchmarks import load_benchmark, prepare_benchmark
from pairvpr.distributed.progress import say
from pairvpr.evaluation.bootstrap import bootstrap_interval
from pairvpr.evaluation.calibrate import decision_report, held_out_queries
from pairvpr.evaluation.confidence import (
    Replay,
    choose_margin,
    expected_calibration_error,
    fit_confidence,
    probability,
    reliability,
)
from pairvpr.evaluation.fit_decision import OWN_TERMS, Fit, LocatedQuery, fit_consensus, fit_fused, own_evidence
from pairvpr.evaluation.report import ERROR_RADII_M, position_errors
from pairvpr.models.weights import build_model, load_weights
from pairvpr.retrieval import pipeline
from pairvpr.retrieval.decision import Decided, decide

WHAT = "decision"
NS = (1, 5, 10)
ROUND_SIZE = 8
MAX_LOSS = 0.1
ORDERS = ("global", "pair", "fused", "consensus")
RECALL_HEAD = ("test", "K", "order", *(f"recall@{n}" for n in NS), *(f"@{n} more than pair" for n in NS))


@dataclass(frozen=True)
class Test:
    """A test's candidates in the order of retrieval, all arrays (Q, K) but for metres of queries (Q, 2)."""

    name: str
    distances: NDArray[np.float32]
    scores: NDArray[np.float32]
    is_positive: NDArray[np.bool_]
    candidates_m: NDArray[np.float64]
    queries_m: NDArray[np.float64]

    def queries(self, num_candidates: int) -> list[LocatedQuery]:
        """With so many candidates of each."""
        return [
            LocatedQuery(
                scores=self.scores[row, :num_candidates],
                is_positive=self.is_positive[row, :num_candidates],
                squared_distances=self.distances[row, :num_candidates],
                utm_m=self.candidates_m[row, :num_candidates],
            )
            for row in range(len(self.scores))
        ]


@dataclass(frozen=True)
class Answers:
    """What one order answers to a test: the positives in its order (Q, K), scores for confidence, metres (Q, 2)."""

    is_right: NDArray[np.bool_]
    top: NDArray[np.float32]
    best_m: NDArray[np.float64]
    estimated_m: NDArray[np.float64]

    def hits(self, n: int) -> NDArray[np.float64]:
        """(Q,) whether a positive is among the first n."""
        return np.asarray(self.is_right[:, :n].any(axis=1), np.float64)


def run(name: str, line: Sequence[str], folder: Path) -> Test:
    """Re-rank all queries of a benchmark, unless that was done and kept in the folder."""
    kept = folder / f"{name}.npz"
    if not kept.exists():
        config = load(EvaluateConfig, [*line, f"output={folder / name}", "describe.batch_size=32"])
        prepare_benchmark(config.benchmark, config.output)
        benchmark = load_benchmark(config.benchmark, config.output)
        assert benchmark.positives is not None
        model = build_model(config.model, load_weights(config.model), torch.device("cpu"))
        answers = pipeline.run(benchmark, model, config)
        rows = [dict(zip(its.reranked.tolist(), its.pair_scores, strict=True)) for its in answers]
        np.savez(
            kept,
            C=np.stack([its.candidates for its in answers]),
            D=np.stack([its.squared_distances for its in answers]),
            S=np.stack([[row[id_] for id_ in its.candidates.tolist()] for its, row in zip(answers, rows, strict=True)]),
            P=np.stack([np.isin(its.candidates, of) for its, of in zip(answers, benchmark.positives, strict=True)]),
            utm=benchmark.database.utm_m,
            q=benchmark.queries.utm_m,
        )
        say(f"{name}: scored")
    with np.load(kept) as found:
        return Test(name, found["D"], found["S"], found["P"], found["utm"][found["C"]], found["q"])


def city(seed: int, places: int, num_candidates: int, folder: Path) -> Test:
    """A drawn city."""
    line = ["benchmark=toy_city", f"benchmark.seed={seed}", f"benchmark.num_places={places}"]
    sizes = [f"rerank.num_candidates={num_candidates}", f"index.num_retrieved={num_candidates}"]
    return run(f"city{seed}", [*line, *sizes], folder)


def corridor(photos: Path, num_candidates: int, folder: Path) -> Test:
    """The real photos."""
    line = ["benchmark=folders", f"benchmark.database={photos}/database", f"benchmark.queries={photos}/queries"]
    line += [f"benchmark.positives={photos}/ground_truth.csv", f"rerank.num_candidates={num_candidates}"]
    return run("corridor", [*line, f"index.num_retrieved={num_candidates}"], folder)


def fits(fitted: Test, num_candidates: int) -> dict[str, Fit]:
    """The decisions fitted to one half of the first city."""
    queries = halves(fitted, num_candidates)[0]
    fused = fit_fused(queries)
    assert fused is not None
    consensus = fit_consensus(queries, fused)
    return {"fused": fused} | ({} if consensus is None else {"consensus": consensus})


def halves(test: Test, num_candidates: int) -> tuple[list[LocatedQuery], list[LocatedQuery]]:
    """What is fitted to, and what is held out, as the job `calibrate` parts them."""
    queries, held_out = test.queries(num_candidates), held_out_queries(len(test.scores))
    first, second = ([query for query, flag in zip(queries, held_out, strict=True) if flag == part] for part in (0, 1))
    return first, second


def answers(test: Test, num_candidates: int, decisions: dict[str, Fit]) -> dict[str, Answers]:
    """What each order answers."""
    queries = test.queries(num_candidates)
    orders = {
        "global": [np.arange(num_candidates)] * len(queries),
        "pair": [np.argsort(-query.scores, kind="stable") for query in queries],
    }
    found = {
        name: _answers(queries, its, np.array([query.scores.max() for query in queries]))
        for name, its in orders.items()
    }
    for name, fit in decisions.items():
        decided: list[Decided] = [
            decide(fit.decision, np.arange(num_candidates), query.squared_distances, query.scores, query.utm_m)
            for query in queries
        ]
        odds = np.array([its.log_odds for its in decided], np.float32)
        positions_m = np.array([its.position_m for its in decided])
        found[name] = _answers(queries, [its.ids for its in decided], odds, positions_m)
    return found


def _answers(
    queries: Sequence[LocatedQuery],
    orders: Sequence[NDArray[np.int64]],
    top: NDArray[np.float32],
    estimated_m: NDArray[np.float64] | None = None,
) -> Answers:
    pairs = list(zip(queries, orders, strict=True))
    best_m = np.stack([query.utm_m[order[0]] for query, order in pairs])
    is_right = np.stack([query.is_positive[order] for query, order in pairs])
    return Answers(is_right, top, best_m, best_m if estimated_m is None else estimated_m)


def recall_rows(test: Test, numbers: Sequence[int], fitted: Test) -> list[list[str]]:
    """recall@N in percent, and what is gained over the pair score alone, paired."""
    rows = []
    for number in numbers:
        found = answers(test, number, fits(fitted, number))
        for name in (its for its in ORDERS if its in found):
            cells = [f"{100 * found[name].hits(n).mean():.1f}" for n in NS]
            gains = [
                "" if name == "pair" else bootstrap_interval(found[name].hits(n) - found["pair"].hits(n)).percent()
                for n in NS
            ]
            rows.append([test.name, str(number), name, *cells, *gains])
    return rows


def error_rows(tests: Sequence[Test], numbers: Sequence[int], fitted: Test) -> list[list[str]]:
    """Expected calibration error of each order's confidence; the pair score's is fitted to the same half."""
    rows = []
    for number in numbers:
        decisions = fits(fitted, number)
        half = halves(fitted, number)[0]
        pair = fit_confidence(
            np.array([query.scores.max() for query in half]), np.array([query.is_right for query in half])
        )
        line = {"pair": pair} | {
            name: (fit.decision.temperature, fit.decision.midpoint) for name, fit in decisions.items()
        }
        for test in tests:
            found = answers(test, number, decisions)
            errors = [
                expected_calibration_error(
                    reliability(probability(found[name].top, *line[name]), found[name].is_right[:, 0])
                )
                for name in line
            ]
            rows.append([test.name, str(number), *(f"{error:.3f}" for error in errors)])
    return rows


def harm_rows(tests: Sequence[Test], fitted: Test) -> list[list[str]]:
    """recall@1 with 50 candidates less that with 10, in points."""
    rows = []
    for test in tests:
        few, many = (answers(test, number, fits(fitted, number)) for number in (10, 50))
        cells = [bootstrap_interval(many[name].hits(1) - few[name].hits(1)).percent() for name in ORDERS[1:]]
        rows.append([test.name, *cells])
    return rows


def position_rows(tests: Sequence[Test], number: int, fitted: Test) -> list[list[str]]:
    """How far answers are from where the queries were."""
    rows = []
    for test in tests:
        found = answers(test, number, fits(fitted, number))
        metres = {f"{name}, photo": its.best_m for name, its in found.items()}
        metres |= {f"{name}, estimated": found[name].estimated_m for name in ("fused", "consensus") if name in found}
        for name, its in metres.items():
            errors = position_errors(its, test.queries_m)
            assert errors is not None
            shares = [f"{errors[f'within_{radius}_m']:.1f}" for radius in ERROR_RADII_M]
            rows.append([test.name, name, f"{errors['median_m']:.2f}", *shares])
    return rows


def stopping_rows(tests: Sequence[Test], number: int, fitted: Test) -> list[list[str]]:
    """recall@1 against pairs scored, by pair score and by evidence, each with margins of its own."""
    half, decision = halves(fitted, number)[0], fits(fitted, number)["fused"].decision
    ways = {"pair": list, "fused": lambda queries: [own_evidence(decision, query) for query in queries]}
    rows = []
    for test in tests:
        for name, way in ways.items():
            replay = Replay(way(half), ROUND_SIZE)
            chosen = choose_margin(replay.curve(replay.thresholds()), MAX_LOSS)
            there = Replay(way(test.queries(number)), ROUND_SIZE)
            curve = there.curve(there.thresholds())
            shown = [curve[int(place)] for place in np.linspace(0, len(curve) - 2, 6)]
            points = [*shown, there.point(chosen), curve[-1]]
            rows.append(
                [test.name, name, *(f"{point.recall_at_1:.1f} / {point.pairs_per_query:.1f}" for point in points)]
            )
    return rows


def ablation_rows(fitted: Test, numbers: Sequence[int]) -> list[list[str]]:
    """What each term adds on the half of the first city that nothing was fitted to."""
    rows = []
    for number in numbers:
        first, second = halves(fitted, number)
        for name, fit in fits(fitted, number).items():
            for term, gain in decision_report(fit, first, second, ROUND_SIZE)["more_than_without"].items():
                cells = f"{gain['points']:+.1f} ({gain['low']:+.1f} to {gain['high']:+.1f})"
                rows.append([str(number), name, term, cells])
    return rows


def fit_rows(fitted: Test, numbers: Sequence[int]) -> list[list[str]]:
    """The decisions themselves."""
    rows = []
    for number in numbers:
        for name, fit in fits(fitted, number).items():
            weights, votes = fit.decision.weights, fit.decision.votes
            own = [f"{value:.3g}" for value in (weights.pair_score, weights.squared_distance, weights.log_rank)]
            its = (votes.radius_m, votes.softness, votes.own, votes.weight) if votes else ()
            cells = [f"{value:.3g}" for value in its] or ["-"] * 4
            rows.append([str(number), name, *own, *cells, f"{fit.decision.nothing:.3g}", f"{fit.log_likelihood:.1f}"])
    return rows


def report(fitted: Test, tests: Sequence[Test], real: Test | None, numbers: Sequence[int], load_at_start: float) -> str:
    """All tables as Markdown."""
    sections = [
        *recall_sections(fitted, tests, numbers),
        *decision_sections(fitted, numbers),
        *answer_sections(fitted, tests, max(number for number in numbers if number <= 50)),
        *corridor_sections(fitted, real, numbers),
        shared.circumstances(WHAT, load_at_start),
    ]
    return "\n\n".join(sections)


def recall_sections(fitted: Test, tests: Sequence[Test], numbers: Sequence[int]) -> list[str]:
    """Recall of each order, what more candidates cost, and how far confidence is off."""
    return [
        "# Decisions: pair score, distance and neighbours together",
        f"""The small network. Decisions are fitted to one half of {fitted.name}'s {len(fitted.scores)} queries, for
each number K of candidates, and tested on other cities. Intervals are 95 % percentile bootstraps over queries, of
paired differences.""",
        "recall@N in percent:",
        table(RECALL_HEAD, [row for test in tests for row in recall_rows(test, numbers, fitted)]),
        "recall@1 with 50 candidates less that with 10, in points:",
        table(("test", *ORDERS[1:]), harm_rows(tests, fitted)),
        "Expected calibration error (10 bins) of the confidence:",
        table(("test", "K", "pair", "fused", "consensus"), error_rows(tests, numbers, fitted)),
    ]


def decision_sections(fitted: Test, numbers: Sequence[int]) -> list[str]:
    """What each term adds, and the decisions themselves."""
    head = ("K", "decision", *OWN_TERMS, "radius, m", "softness", "own", "votes", "nothing", "log-likelihood")
    return [
        f"""What each term adds: points of recall@1 on the half of {fitted.name} that was not fitted to, with the
term less without it (the others fitted anew):""",
        table(("K", "decision", "term", "points"), ablation_rows(fitted, numbers)),
        "The decisions (docs/decision.md):",
        table(head, fit_rows(fitted, numbers)),
    ]


def answer_sections(fitted: Test, tests: Sequence[Test], number: int) -> list[str]:
    """How far answers are from the truth, and recall against pairs scored."""
    points = [f"{share:.0%} of margins" for share in np.linspace(0, 1, 6)]
    return [
        f"""Distance between the answer and where the query was taken, K = {number}, in metres, and the share
of queries within 5, 25 and 100 m in percent:""",
        table(
            ("test", "answer", "median", *(f"{radius} m" for radius in ERROR_RADII_M)),
            position_rows(tests, number, fitted),
        ),
        f"""Stopping early, K = {number} in rounds of {ROUND_SIZE}: recall@1 / pairs scored a query at some
margins, at the one that loses at most {MAX_LOSS} points where decisions were fitted, and with everything scored:""",
        table(("test", "stops by", *points, "chosen", "all"), stopping_rows(tests, number, fitted)),
    ]


def corridor_sections(fitted: Test, real: Test | None, numbers: Sequence[int]) -> list[str]:
    """The same on real photos, where there are any."""
    if real is None:
        return ["There were no corridor photos at hand."]
    few = [number for number in numbers if number <= real.scores.shape[1]]
    return [
        f"""The same on {len(real.scores)} real queries of the corridor, with the same network, which
knows drawn streets only, and the decision of {fitted.name}. No position is known.""",
        table(RECALL_HEAD, [row for row in recall_rows(real, few, fitted) if row[2] != "consensus"]),
        table(("test", "K", "pair", "fused"), [row[:4] for row in error_rows([real], few, fitted)]),
    ]


def main() -> None:
    """One city to fit to, then those to test on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13, 14], help="cities (11 12 13 14)")
    parser.add_argument("--places", type=int, default=350, help="places of each city (350)")
    parser.add_argument("--candidates", type=int, nargs="+", default=[10, 20, 50, 100], help="K (10 20 50 100)")
    parser.add_argument("--keep", type=Path, help="folder for the cities' photos and scores, which are used again")
    parser.add_argument("--corridor", type=Path, help="folder with database/, queries/ and ground_truth.csv")
    shared.add_report_option(parser, WHAT)
    options = parser.parse_args()
    load_at_start = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        cities = [city(seed, options.places, max(options.candidates), folder) for seed in options.seeds]
        real = corridor(options.corridor, max(options.candidates), folder) if options.corridor else None
    shared.publish(WHAT, report(cities[0], cities[1:], real, options.candidates, load_at_start), options.report)


if __name__ == "__main__":
    main()
