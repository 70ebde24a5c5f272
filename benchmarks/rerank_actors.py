"""Re-ranking actors: the time they spend outside the network, and two of them on two cores against one on one.

    python -m benchmarks.rerank_actors --report

Run it by hand on an idle machine with two cores, from the root of the checkout; it takes some 15 minutes. Photos of a
toy city (640 x 480 JPEG) are re-ranked by `pairvpr.distributed.rerank.rerank`, with vits at 322 px (random weights: the
time is the same). The queries of a unit share their candidates. Ways alternate over the rounds:

- one actor of one thread, held to one core (its loading thread too)
- two actors of one thread each
- one actor of two threads

An actor's time goes from the beginning of its first unit to the end of its last one, waiting for the next unit
included; the network's part is what `PairVPR.describe`, `PairVPR.embed` and `PairScorer` take. With one thread that is
CPU time, so that what a loading thread takes of the same core counts as outside; with two it is wall time. Of two
actors the one that took longer counts; the start of the other may fall into that. What two cores are worth here is
measured beside it: matrix products of the network's sizes by one process, and by two at once. Linux only. Ends with
status 1 if one and two actors gave different scores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import ray
import torch

import pairvpr.distributed.rerank as distributed
from benchmarks import shared
from pairvpr.config.compose import load
from pairvpr.config.schema import ClusterConfig, EvaluateConfig
from pairvpr.data.manifest import Benchmark, Manifest
from pairvpr.distributed.network import ModelSource
from pairvpr.distributed.pool import PoolActor
from pairvpr.distributed.progress import say
from pairvpr.distributed.runtime import ray_session
from pairvpr.models.weights import load_weights
from pairvpr.retrieval.rerank import Reranked, WorkUnit

WHAT = "rerank_actors"
MODEL = "vits"
GOAL_OUTSIDE, GOAL_SPEED_UP = 0.05, 1.8
PRODUCT_SIZES, PRODUCT_S = (530, 768, 3072), 5.0
ONE, TWO, ONE_OF_TWO_THREADS = "one actor, one core", "two actors, two cores", "one actor of two threads"
Actor: Any = distributed._RerankActor.__ray_actor_class__  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Way:
    """How many actors, of how many threads, held to how many cores."""

    num_actors: int
    num_threads: int
    num_cores: int


WAYS = {ONE: Way(1, 1, 1), TWO: Way(2, 1, 2), ONE_OF_TWO_THREADS: Way(1, 2, 2)}


@dataclass(frozen=True)
class UnitTimes:
    """One unit: when its actor began and ended it (seconds of the machine's clock), how long its network worked."""

    actor: int
    start_s: float
    stop_s: float
    network_s: float


class NetworkClock:
    """Seconds of a clock inside the functions that it has wrapped; a function within another one counts once."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self.seconds = 0.0
        self._now_s = now_s
        self._is_inside = False

    def wrap(self, owner: Any, *names: str) -> None:
        """Put clocked functions in the place of the owner's."""
        for name in names:
            setattr(owner, name, self._clocked(getattr(owner, name)))

    def _clocked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def clocked(*arguments: Any, **options: Any) -> Any:
            if self._is_inside:
                return function(*arguments, **options)
            self._is_inside, start_s = True, self._now_s()
            try:
                return function(*arguments, **options)
            finally:
                self._is_inside = False
                self.seconds += self._now_s() - start_s

        return clocked


class TimedActor(PoolActor):
    """The re-ranking actor, whose network is clocked; times of a unit lie beside its answers."""

    def __init__(self, way: Way, source: Any, benchmark: Any, config: Any, directory: str, *more: Any) -> None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: way.num_cores])
        self.actor = Actor(source, benchmark, config, directory, *more)
        self.clock = NetworkClock(time.thread_time if way.num_threads == 1 else time.perf_counter)
        self.directory = Path(directory)
        reranker = self.actor.reranker
        self.clock.wrap(reranker.model, "describe", "embed")
        self.clock.wrap(reranker._scorer, "as_first", "as_memory", "logits")

    def run(self, unit: WorkUnit) -> None:
        """The actor's, clocked."""
        start_s, network_s = time.monotonic(), self.clock.seconds
        self.actor.run(unit)
        times = UnitTimes(os.getpid(), start_s, time.monotonic(), self.clock.seconds - network_s)
        (self.directory / f"times_{unit.unit}.json").write_text(json.dumps(asdict(times)))


@dataclass(frozen=True)
class Run:
    """What one way took once; a unit that was tried twice counts as its last try."""

    times: Sequence[UnitTimes]
    wall_s: float
    answers: dict[int, Reranked]

    @property
    def working_s(self) -> float:
        """Of the actor that took longest."""
        return max(self._spans_s)

    @property
    def outside(self) -> float:
        """Share of the actors' time that was not spent in the network."""
        return 1 - sum(one.network_s for one in self.times) / sum(self._spans_s)

    @property
    def _spans_s(self) -> list[float]:
        """From the beginning of each actor's first unit to the end of its last one."""
        by_actor: dict[int, list[UnitTimes]] = {}
        for one in self.times:
            by_actor.setdefault(one.actor, []).append(one)
        return [max(one.stop_s for one in its) - min(one.start_s for one in its) for its in by_actor.values()]


@dataclass(frozen=True)
class Case:
    """The work: the same for all ways."""

    benchmark: Benchmark
    units: Sequence[WorkUnit]
    source: ModelSource

    @property
    def num_pairs(self) -> int:
        """Of all units."""
        return sum(len(ids) for unit in self.units for ids in unit.candidates.values())


def job_config(way: Way, queries_per_unit: int) -> EvaluateConfig:
    """As the job would be told."""
    return load(
        EvaluateConfig,
        [
            "benchmark=toy_city",
            "output=unused",
            f"model={MODEL}",
            "model.weights=null",
            f"rerank.num_actors={way.num_actors}",
            f"rerank.num_threads_per_actor={way.num_threads}",
            "rerank.num_gpus_per_actor=0",
            f"rerank.queries_per_unit={queries_per_unit}",
        ],
    )


def rerank(case: Case, way: Way, queries_per_unit: int) -> Run:
    """All units by the job's own function, in a folder that is gone afterwards."""

    class Held:
        """A clocked actor's options, where the job looks for its actor's."""

        @staticmethod
        def options(**options: Any) -> Any:
            made = ray.remote(TimedActor).options(**options)

            class Made:
                @staticmethod
                def remote(*arguments: Any) -> Any:
                    return made.remote(way, *arguments)

            return Made

    with tempfile.TemporaryDirectory() as directory, patch.object(distributed, "_RerankActor", Held):
        start_s = time.monotonic()
        config = job_config(way, queries_per_unit)
        answers = distributed.rerank(case.units, case.benchmark, case.source, config.rerank, directory).by_query
        wall_s = time.monotonic() - start_s
        files = [Path(directory) / f"times_{unit.unit}.json" for unit in case.units]
        return Run([UnitTimes(**json.loads(file.read_text())) for file in files], wall_s, answers)


def largest_difference(one: Run, other: Run) -> float:
    """Between pair scores."""
    differences = [0.0]
    for query_id, answer in one.answers.items():
        theirs = other.answers[query_id]
        order, their_order = np.argsort(answer.ids), np.argsort(theirs.ids)
        differences.append(float(np.abs(answer.pair_scores[order] - theirs.pair_scores[their_order]).max()))
    return max(differences)


def products_per_s(barrier: Any, found: Any) -> None:
    """Matrix products of one thread, once all processes are ready."""
    torch.set_num_threads(1)
    rows, inner, columns = PRODUCT_SIZES
    left, right = torch.rand(rows, inner), torch.rand(inner, columns)
    for _ in range(3):
        torch.mm(left, right)
    barrier.wait()
    number, start_s = 0, time.monotonic()
    while time.monotonic() - start_s < PRODUCT_S:
        torch.mm(left, right)
        number += 1
    found.put(number / (time.monotonic() - start_s))


def bare(num_processes: int) -> float:
    """Products a second of so many processes together."""
    context = multiprocessing.get_context("spawn")
    barrier, found = context.Barrier(num_processes), context.Queue()
    processes = [context.Process(target=products_per_s, args=(barrier, found)) for _ in range(num_processes)]
    for process in processes:
        process.start()
    total = sum(found.get() for _ in processes)
    for process in processes:
        process.join()
    return total


def make_case(folder: Path, options: argparse.Namespace) -> Case:
    """Photos, and units whose queries share their candidates; the next unit has others."""
    num_units, per_unit, num_candidates = options.units, options.queries_per_unit, options.candidates
    num_queries, num_database = num_units * per_unit, num_units * num_candidates
    shared.draw_photos(folder, num_database + num_queries, num_database + num_queries)
    paths = [shared.photo_name(i) for i in range(num_database + num_queries)]
    database, queries = (Manifest.of(str(folder), its) for its in (paths[:num_database], paths[num_database:]))
    benchmark = Benchmark(name="photos", database=database, queries=queries, positives=None, protocol={})
    units = [
        WorkUnit(
            unit,
            {
                unit * per_unit + query: range(unit * num_candidates, (unit + 1) * num_candidates)
                for query in range(per_unit)
            },
        )
        for unit in range(num_units)
    ]
    config = job_config(WAYS[ONE], per_unit).model
    return Case(benchmark, units, ModelSource(config, ray.put(load_weights(config))))


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds (3)")
    parser.add_argument("--units", type=int, default=4, help="work units, an even number (4)")
    parser.add_argument("--queries-per-unit", type=int, default=2, help="queries of a unit (2)")
    parser.add_argument("--candidates", type=int, default=6, help="candidates of a query (6)")
    shared.add_report_option(parser, WHAT)
    return parser.parse_args()


def report(runs: dict[str, list[Run]], products: dict[int, list[float]], case: Case, load_at_start: float) -> str:
    """Tables and goals as Markdown."""
    medians = {name: statistics.median(run.working_s for run in its) for name, its in runs.items()}
    rows = [
        [
            name,
            f"{case.num_pairs / medians[name]:.3f}",
            ", ".join(f"{run.working_s:.1f}" for run in its),
            f"{statistics.median(run.wall_s - run.working_s for run in its):.1f}",
            ", ".join(f"{100 * run.outside:.2f} %" for run in its),
            f"{max(largest_difference(runs[ONE][0], run) for run in its):.1e}",
        ]
        for name, its in runs.items()
    ]
    header = (
        "",
        "pairs/s",
        "seconds of each round",
        "the rest of the call (s)",
        "outside the network",
        "score difference",
    )
    speed_up = medians[ONE] / medians[TWO]
    of_machine = statistics.median(products[2]) / statistics.median(products[1])
    outside = {name: statistics.median(run.outside for run in runs[name]) for name in (ONE, ONE_OF_TWO_THREADS)}
    goals = [
        f"- {'met' if share <= GOAL_OUTSIDE else '**missed**'}: {name}: {100 * share:.2f} % of its time outside the "
        f"network, goal at most {100 * GOAL_OUTSIDE:g} %"
        for name, share in outside.items()
    ]
    goals.append(
        f"- {'met' if speed_up >= GOAL_SPEED_UP else '**missed**'}: {TWO}: {speed_up:.2f} times as fast as {ONE}, "
        f"goal at least {GOAL_SPEED_UP}; bare matrix products: {of_machine:.2f} times"
    )
    unit = case.units[0].candidates
    return "\n\n".join(
        [
            "# Re-ranking actors",
            f"{MODEL} at 322 px, fp32, {len(case.units)} units of {len(unit)} queries x the same {len(unit[0])} "
            f"candidates: {case.num_pairs} pairs, JPEG photos of {shared.WIDTH_PX} x {shared.HEIGHT_PX}. Seconds go "
            "from the beginning of an actor's first unit to the end of its last one, of the actor that took longest.",
            shared.markdown_table(header, rows),
            "\n".join(goals),
            "## Circumstances",
            shared.circumstances(WHAT, load_at_start),
        ]
    )


def main() -> int:
    """All rounds, one report."""
    options, load_at_start = parsed(), os.getloadavg()[0]
    os.environ.pop("RAY_ADDRESS", None)
    runs, products = dict[str, list[Run]](), dict[int, list[float]]()
    with tempfile.TemporaryDirectory() as folder, ray_session(ClusterConfig(num_cpus=2)):
        say("drawing the photos")
        case = make_case(Path(folder), options)
        for number in range(options.rounds):
            for num_processes in (1, 2):
                products.setdefault(num_processes, []).append(bare(num_processes))
            for name, way in WAYS.items():
                run = rerank(case, way, options.queries_per_unit)
                runs.setdefault(name, []).append(run)
                say(f"round {number + 1}: {name}: {run.working_s:.1f} s, {100 * run.outside:.1f} % outside")
    shared.publish(WHAT, report(runs, products, case, load_at_start), options.report)
    return int(any(largest_difference(runs[ONE][0], run) > 0 for run in runs[TWO]))


if __name__ == "__main__":
    sys.exit(main())
