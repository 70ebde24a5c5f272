"""Re-ranking on a CPU against the published procedure written plainly: pairs, each reuse, end to end.

    python -m benchmarks.rerank_speed --report

Run it by hand on an idle machine, from the root of the checkout; it takes some 20 minutes on two cores. The network
has random weights and full size (322 px, decoder width 768); photos are noise: neither changes how long it takes.
Each comparison alternates over the rounds; medians are compared. What is in RAM already is given to both sides.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks import shared
from benchmarks.rerank_work import (
    REUSES,
    City,
    largest_difference,
    network,
    our_city,
    ours,
    plain,
    plain_city,
    plain_dense,
    random_city,
)
from pairvpr.config.schema import Precision

WHAT = "rerank_speed"
CPU = torch.device("cpu")
LARGE_CACHE_BYTES = 1 << 32
SMALLEST_DIFFERENCE = 1e-4


@dataclass
class Race:
    """Ways to do the same work, timed in turn; the first is the baseline. Answers are scores by query."""

    ways: Mapping[str, Callable[[], Mapping[int, Tensor]]]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    answers: dict[str, Mapping[int, Tensor]] = field(default_factory=dict)

    def run(self, num_rounds: int) -> None:
        """Every way, `num_rounds` times, alternating."""
        for number in range(num_rounds):
            for name, way in self.ways.items():
                start_s = time.perf_counter()
                self.answers[name] = way()
                self.seconds.setdefault(name, []).append(time.perf_counter() - start_s)
                print(f"round {number + 1}: {name} {self.seconds[name][-1]:.2f} s", flush=True)

    def ratio(self, name: str, baseline: str | None = None) -> float:
        """How many times as fast as the baseline, by medians."""
        first = baseline or next(iter(self.ways))
        return statistics.median(self.seconds[first]) / statistics.median(self.seconds[name])

    def table(self) -> str:
        """A row for each way."""
        first = next(iter(self.ways))
        rows = [
            [
                name,
                f"{statistics.median(seconds):.2f}",
                ", ".join(f"{its:.2f}" for its in seconds),
                f"{self.ratio(name):.2f}",
                f"{largest_difference(self.answers[first], self.answers[name]):.1e}",
            ]
            for name, seconds in self.seconds.items()
        ]
        return shared.markdown_table(("", "seconds", "each round", "times as fast", "largest score difference"), rows)


def pairs(options: argparse.Namespace) -> list[str]:
    """One query and its candidates, their dense features at hand."""
    exact, rounded = network("vitb", CPU), network("vitb", CPU, Precision.bf16)
    city = random_city(1, options.candidates, 322)
    with torch.no_grad():
        query, *candidates = (plain_dense(exact, pixels) for pixels in (*city.queries, *city.database))
    dense = torch.stack(candidates)
    race = Race(
        {
            "published procedure, fp32": lambda: {0: plain(exact, query, dense)},
            "ours, fp32": lambda: {0: ours(exact, query, dense, batch_size=options.batch_size)},
            "ours, bf16": lambda: {0: ours(rounded, query, dense, batch_size=options.batch_size)},
        }
    )
    race.run(options.rounds)
    scores = race.answers["published procedure, fp32"][0]
    difference = largest_difference(race.answers["published procedure, fp32"], race.answers["ours, fp32"])
    return [
        f"vitb, {options.candidates} candidates of one query, {options.batch_size} pairs in a forward pass. The "
        f"scores' standard deviation is {float(scores.std()):.1e}: random weights tell pairs apart badly.",
        race.table(),
        goal("fp32: times as fast as the published procedure", race.ratio("ours, fp32"), 1.2),
        f"- {'met' if difference < SMALLEST_DIFFERENCE else '**missed**'}: fp32: scores differ by {difference:.1e} at "
        f"most, goal below {SMALLEST_DIFFERENCE:.0e}",
        goal("bf16: times as fast as the published procedure", race.ratio("ours, bf16"), 2.5),
    ]


def reuses(options: argparse.Namespace) -> list[str]:
    """Each reuse alone, for one query and for two queries that share their candidates."""
    model = network("vitb", CPU)
    city = random_city(1, options.candidates // 2, 322)
    with torch.no_grad():
        query, *candidates = (plain_dense(model, pixels) for pixels in (*city.queries, *city.database))
    dense = torch.stack(candidates)
    ways: dict[str, Callable[[], Mapping[int, Tensor]]] = {
        name: (lambda reuse=reuse: {0: ours(model, query, dense, batch_size=options.batch_size, reuse=reuse)})
        for name, reuse in REUSES.items()
    }
    race = Race(ways)
    race.run(options.rounds)
    return [
        f"vitb, fp32, {len(dense)} candidates of one query, which share nothing but the query: `decoder_embed` is "
        "computed once for an image in all of these rows.",
        race.table(),
    ]


def end_to_end(
    options: argparse.Namespace, num_queries: int, num_candidates: int, decoder_depth: int, *, with_efficient: bool
) -> list[str]:
    """From pixels to scores: queries that share all their candidates."""
    model = network("vitb", CPU, decoder_depth=decoder_depth)
    city: City = random_city(num_queries, num_candidates, 322)
    stored, efficient, cached = "published, features in RAM", "published, memory-efficient mode", "ours, cache"
    ways: dict[str, Callable[[], Mapping[int, Tensor]]] = {
        stored: lambda: plain_city(model, city, keeps_features=True),
        efficient: lambda: plain_city(model, city, keeps_features=False),
        cached: lambda: our_city(
            model,
            city,
            batch_size=options.batch_size,
            queries_per_unit=options.queries_per_unit,
            cache_bytes=LARGE_CACHE_BYTES,
        ),
    }
    if not with_efficient:
        del ways[efficient]
    race = Race(ways)
    race.run(options.city_rounds)
    return [
        f"vitb, decoder of {decoder_depth} blocks, fp32: {num_queries} queries x the same {num_candidates} candidates, "
        f"described and scored, in units of {options.queries_per_unit} queries.",
        race.table(),
        goal(f"times as fast as the {stored}", race.ratio(cached), 1.35),
        *([goal(f"times as fast as the {efficient}", race.ratio(cached, efficient), 1.35)] if with_efficient else []),
    ]


def goal(what: str, reached: float, wanted: float) -> str:
    """A line: met or missed."""
    return f"- {'met' if reached >= wanted else '**missed**'}: {what}: {reached:.2f}, goal at least {wanted}"


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (2)")
    parser.add_argument("--candidates", type=int, default=8, help="candidates of the query (8)")
    parser.add_argument("--batch-size", type=int, default=4, help="pairs in one of our forward passes (4)")
    parser.add_argument("--queries-per-unit", type=int, default=4, help="of the end-to-end runs (4)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of pairs and reuses (3)")
    parser.add_argument("--city-rounds", type=int, default=2, help="rounds of the end-to-end runs (2)")
    shared.add_report_option(parser, WHAT)
    return parser.parse_args()


def main() -> None:
    """All sections."""
    options, load_at_start = parsed(), os.getloadavg()[0]
    torch.set_num_threads(options.threads)
    sections = {
        "Pairs": pairs(options),
        "Each reuse alone": reuses(options),
        "End to end: the whole decoder": end_to_end(options, 6, 6, 12, with_efficient=True),
        "End to end: a decoder of two blocks": end_to_end(options, 20, 20, 2, with_efficient=False),
    }
    text = "\n\n".join("\n\n".join([f"## {title}", *lines]) for title, lines in sections.items())
    report = f"""# Re-ranking on a CPU

{options.threads} threads. The published procedure: fp32, a query at a time, its features repeated for every candidate,
both directions, the whole decoder, torch's own layers; its candidates' features are in RAM, or described again for each
query (its memory-efficient mode).

{text}

## Circumstances

{shared.circumstances(WHAT, load_at_start)}"""
    shared.publish(WHAT, report, options.report)


if __name__ == "__main__":
    main()
