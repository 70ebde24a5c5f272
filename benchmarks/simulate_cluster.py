"""How the hours of 100 million photos fall from 1 to 256 GPUs, and where the driver becomes the limit.

    python -m benchmarks.simulate_cluster --report benchmarks/reports/simulated_cluster_DATE.md

Run it by hand from the root of the checkout; it takes some minutes of one core, and no network. The decisions are those
of `SupervisedPool` itself, over a cluster that does not exist, in virtual time. The clock counts the work of the
simulated actors and the processor time of the pool's own code, which also grows with the actors. Machines vanish and
units straggle at the rates below. The driver's other work is done for real: the bookkeeping of all parts of 100 million
photos, and the merging of 400 shards' answers to some queries.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import io
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import ray
from ray.exceptions import RayActorError

from benchmarks import shared
from pairvpr.config.schema import ClusterConfig
from pairvpr.data.manifest import Manifest
from pairvpr.distributed.describe import _Commits
from pairvpr.distributed.parts import Parts
from pairvpr.distributed.pool import PoolActor, SupervisedPool
from pairvpr.distributed.runtime import ray_session
from pairvpr.index.descriptor_shards import ShardRange, shard_ranges
from pairvpr.index.merge import Found, merge_top_k
from pairvpr.retrieval.rerank import work_units

WHAT = "simulated_cluster"
NUM_PHOTOS, NUM_QUERIES, NUM_CANDIDATES = 100_000_000, 100_000, 100
NUM_SHARDS, NUM_GROUPS = 400, 17
GPUS = (1, 4, 16, 64, 128, 256)
CPUS_PER_GPU = 16
PARTS_TOGETHER = 16
"""Parts that the simulation takes as one unit; Ray Data, which describes, is not the pool."""
QUERIES_PER_UNIT = 8
PHOTOS_PER_S, PAIRS_PER_S = 1000.0, 300.0
LEARN_S, FILL_S, SEARCH_S = 348.0, 23.8, 270.0
"""The first two as in `index_at_size_*`; 100,000 queries on a group, by the 1.3 ms of 2.8 million rows there."""
START_S, BOOT_S, NOTICE_S = 30.0, 180.0, 15.0
STRAGGLERS = 0.15
FAULTS = {
    "nothing fails": (0.0, 0.0),
    "stragglers, 5 % of machines lost an hour": (STRAGGLERS, 0.05),
    "stragglers, 33 % of machines lost an hour": (STRAGGLERS, 0.33),
}


@dataclass(eq=False)
class _Call:
    """A call of an actor, which ends at `ends_s` with a result, or with the death of its machine."""

    ends_s: float
    result: Any
    is_lost: bool


@dataclass
class _Method:
    """What stands before `.remote`."""

    call: Callable[..., _Call]

    def remote(self, *arguments: Any) -> _Call:
        return self.call(*arguments)


@dataclass
class _Actor:
    """An actor on the machine of a slot, ready from `ready_s` on; units are the seconds that they take."""

    cluster: Cluster
    slot: int
    machine: _Machine
    ready_s: float

    @property
    def node_id(self) -> _Method:
        return _Method(lambda: self._until(self.ready_s, self.machine.name))

    @property
    def work(self) -> _Method:
        return _Method(lambda seconds, _step: self._until(self.cluster.virtual_s + self.cluster.taken(seconds), None))

    def _until(self, ends_s: float, result: Any) -> _Call:
        dies_s = max(self.machine.dies_s, self.cluster.virtual_s)
        call = _Call(min(ends_s, dies_s), result, is_lost=dies_s < ends_s)
        self.cluster.send(call)
        return call


@dataclass
class _Machine:
    name: str
    up_s: float
    dies_s: float


@dataclass
class Cluster:
    """A cluster in virtual time: `Transport` of the pool. `driver_s` is the processor time of the pool's own code."""

    num_machines: int
    actors_each: int
    straggling: float
    lost_an_hour: float
    random: random.Random
    virtual_s: float = 0.0
    driver_s: float = 0.0
    num_lost: int = 0
    machines: list[_Machine] = field(default_factory=list)
    gone: list[_Machine] = field(default_factory=list)
    calls: list[tuple[float, int, _Call]] = field(default_factory=list)
    free: list[int] = field(default_factory=list)
    num_calls: int = 0
    left_s: float = field(default_factory=time.process_time)

    def __post_init__(self) -> None:
        self.machines = [self._machine(number, 0.0) for number in range(self.num_machines)]
        self.free = list(reversed(range(self.num_machines * self.actors_each)))

    def _machine(self, number: int, up_s: float) -> _Machine:
        lives_s = self.random.expovariate(self.lost_an_hour / 3600) if self.lost_an_hour else float("inf")
        return _Machine(f"{number}.{self.num_lost}", up_s, up_s + lives_s)

    def make_actor(self) -> _Actor:
        """An actor in a free place; a machine that is gone has been replaced, or is being."""
        slot = self.free.pop()
        number = slot // self.actors_each
        if self.machines[number].dies_s <= self.virtual_s:
            self.num_lost += 1
            self.gone.append(self.machines[number])
            self.machines[number] = self._machine(number, self.machines[number].dies_s + BOOT_S)
        machine = self.machines[number]
        return _Actor(self, slot, machine, max(self.virtual_s, machine.up_s) + START_S)

    def taken(self, seconds: float) -> float:
        """What a unit takes, which may be a straggler."""
        if self.random.random() >= self.straggling:
            return seconds
        kind = self.random.random()
        low, high = (1.5, 2.5) if kind < 0.8 else (2.5, 10.0) if kind < 0.9 else (10.0, 20.0)
        return seconds * self.random.uniform(low, high)

    def send(self, call: _Call) -> None:
        """A call is on its way."""
        self.num_calls += 1
        heapq.heappush(self.calls, (call.ends_s, self.num_calls, call))

    def _enter(self) -> None:
        passed_s = time.process_time() - self.left_s
        self.driver_s += passed_s
        self.virtual_s += passed_s

    def now_s(self) -> float:
        return self.virtual_s

    def sleep(self, seconds: float) -> None:
        self.virtual_s += seconds

    def ended(self, refs: Sequence[_Call], timeout_s: float) -> Sequence[_Call]:
        self._enter()
        awaited, until_s = set(refs), self.virtual_s + timeout_s
        found: list[_Call] = []
        while self.calls and not found and self.calls[0][0] <= until_s:
            ends_s, _, call = heapq.heappop(self.calls)
            if call in awaited:  # else its actor was replaced meanwhile
                found, until_s = [call], max(self.virtual_s, ends_s)
        self.virtual_s = until_s
        self.left_s = time.process_time()
        return found

    def result(self, ref: _Call) -> Any:
        if ref.is_lost:
            raise RayActorError
        return ref.result

    def kill(self, actor: _Actor) -> None:
        self.free.append(actor.slot)

    def resources(self) -> Any:
        return {"GPU": self.num_machines}

    def live_nodes(self) -> set[str]:
        known_dead = {each.name for each in self.gone if each.dies_s + NOTICE_S <= self.virtual_s}
        return {each.name for each in [*self.gone, *self.machines]} - known_dead


@dataclass(frozen=True)
class Step:
    """A step of the run: units of equal work, at most so many actors for each GPU's machine."""

    name: str
    num_units: int
    seconds_each: float
    actors_each: int


@dataclass(frozen=True)
class Outcome:
    """A step in virtual time: its hours, machines lost, calls that were sent, and the driver's processor time."""

    hours: float
    num_lost: int
    num_calls: int
    driver_s: float


def steps() -> list[Step]:
    """Of 100 million photos as RaBitQ codes, and 100,000 queries."""
    parts = _parts()
    together = parts.photos_per_part * PARTS_TOGETHER
    per_unit = QUERIES_PER_UNIT * NUM_CANDIDATES
    return [
        Step("describe", -(-NUM_PHOTOS // together), together / PHOTOS_PER_S, 1),
        Step("learn", 1, LEARN_S, 1),
        Step("fill", NUM_SHARDS, FILL_S, CPUS_PER_GPU // 2),
        Step("search", NUM_GROUPS, SEARCH_S, CPUS_PER_GPU // 2),
        Step("re-rank", -(-NUM_QUERIES // QUERIES_PER_UNIT), per_unit / PHOTOS_PER_S + per_unit / PAIRS_PER_S, 1),
    ]


def _parts() -> Parts:
    return Parts.of("parts", NUM_PHOTOS, 32, 322)


def run(step: Step, num_gpus: int, straggling: float, lost_an_hour: float, seed: int = 0) -> Outcome:
    """The step on so many machines of a GPU each, decided by the pool itself."""
    cluster = Cluster(num_gpus, step.actors_each, straggling, lost_an_hour, random.Random(seed))
    num_actors = min(step.num_units, num_gpus * step.actors_each)
    done: list[int] = []
    with SupervisedPool[float](cluster.make_actor, num_actors, step.name, transport=cluster) as pool:
        failed = pool.run(dict.fromkeys(range(step.num_units), step.seconds_each), lambda key, _: done.append(key))
    assert not failed
    assert sorted(done) == list(range(step.num_units))
    return Outcome(cluster.virtual_s / 3600, cluster.num_lost, cluster.num_calls, cluster.driver_s)


@dataclass(frozen=True)
class DriverWork:
    """A piece of the driver's real work: messages that it handles, seconds in all, memory at its peak."""

    what: str
    num_messages: int
    seconds: float
    peak_bytes: int


class _CountedCommits(_Commits):
    """The driver's bookkeeping of parts, with commits counted and not sent."""

    num_sent = 0

    def _commit(self, shard: ShardRange) -> None:
        self.num_sent += 1


def parts_of_a_hundred_million() -> DriverWork:
    """Every part of 400 shards is reported done, in a random order within a window of 1,000, as from many actors."""
    description: Any = _Unfinished("nothing is here", _parts())
    order = np.arange(len(_parts()))
    order = np.argsort(order + np.random.default_rng(0).uniform(0, 1000, len(order)), kind="stable").tolist()

    def work() -> None:
        commits = _CountedCommits(description, shard_ranges(NUM_PHOTOS, NUM_SHARDS), "describe")
        for part in order:
            commits.part_is_done(part)
        assert commits.num_sent == NUM_SHARDS

    return _measured("parts done, shards committed", len(order), work)


@dataclass(frozen=True)
class _Unfinished:
    """What the bookkeeping reads of a description of which nothing is there yet."""

    directory: str
    parts: Parts


def answers_of_shards(num_queries: int, k: int) -> DriverWork:
    """400 shards' answers are merged, as `retrieve` does; each is drawn when it comes."""
    random_numbers = np.random.default_rng(0)
    best: list[Found] = []
    drawing_s = 0.0

    def work() -> None:
        nonlocal drawing_s
        for shard in range(NUM_SHARDS):
            began_s = time.perf_counter()
            distances = np.sort(random_numbers.random((num_queries, k), np.float32), axis=1)
            ids = random_numbers.integers(shard * 250_000, (shard + 1) * 250_000, (num_queries, k))
            drawing_s += time.perf_counter() - began_s
            best[:] = [merge_top_k([*best, (distances, ids)], k)]

    done = _measured(f"{num_queries:,} x {k:,} answers of {NUM_SHARDS} shards merged", NUM_SHARDS, work)
    return replace(done, seconds=done.seconds - drawing_s)


def units_of_queries(num_queries: int) -> DriverWork:
    """Units of queries whose candidates are neighbours on a street of 100 million photos."""
    starts = np.random.default_rng(0).integers(0, NUM_PHOTOS - NUM_CANDIDATES, num_queries)
    candidates = {query: range(start, start + NUM_CANDIDATES) for query, start in enumerate(starts.tolist())}
    return _measured("queries grouped into units", num_queries, lambda: work_units(candidates, QUERIES_PER_UNIT))


def list_of_photos(num_photos: int) -> DriverWork:
    """The manifest of so many photos, with paths of 44 characters."""

    def work() -> Manifest:
        chunks = [range(first, first + 100_000) for first in range(0, num_photos, 100_000)]
        paths = [pa.array([f"day_0001/street_000001/camera_1/{photo:012d}" for photo in chunk]) for chunk in chunks]
        return Manifest.of("s3://bucket/photos", pa.chunked_array(paths))

    return _measured(f"a list of {num_photos:,} photos", num_photos, work)


def _measured(what: str, num_messages: int, work: Callable[[], object]) -> DriverWork:
    before, started_s = psutil.Process().memory_info().rss, time.perf_counter()
    peak = [before]
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(0.02):
            peak[0] = max(peak[0], psutil.Process().memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        kept = work()
        seconds = time.perf_counter() - started_s
        peak[0] = max(peak[0], psutil.Process().memory_info().rss)
    finally:
        is_over.set()
        watcher.join()
    del kept
    return DriverWork(what, num_messages, seconds, peak[0] - before)


@ray.remote(num_cpus=0.5)
class _Idle(PoolActor):
    def run(self, unit: int) -> int:
        return unit


def units_through_ray(num_units: int) -> DriverWork:
    """Units of no work through the pool and a Ray of two CPUs on this machine: the actors' own time is in it."""
    with ray_session(ClusterConfig(num_cpus=2)), SupervisedPool[int](_Idle.remote, 4, "idle") as pool:
        pool.run({0: 0, 1: 1, 2: 2, 3: 3}, lambda _key, _result: None)
        return _measured(
            "units of no work through Ray, 4 actors",
            num_units,
            lambda: pool.run(dict(enumerate(range(num_units))), lambda _key, _result: None),
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared.add_report_option(parser, WHAT)
    parser.add_argument("--most-gpus", type=int, default=GPUS[-1])
    parser.add_argument("--merged-queries", type=int, default=10_000, help="queries whose answers are merged for real")
    parser.add_argument("--through-ray", type=int, default=1000, help="units that pass a real Ray; 0 = none")
    chosen = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    works = [
        *([units_through_ray(chosen.through_ray)] if chosen.through_ray else []),
        parts_of_a_hundred_million(),
        answers_of_shards(chosen.merged_queries, 1000),
        units_of_queries(chosen.merged_queries),
        list_of_photos(NUM_PHOTOS // 50),
    ]
    sizes = [number for number in GPUS if number <= chosen.most_gpus]
    with contextlib.redirect_stderr(io.StringIO()):  # a line for each lost actor
        outcomes = {
            (name, number): {step.name: run(step, number, *rates) for step in steps()}
            for name, rates in FAULTS.items()
            for number in sizes
        }
        many = Step("units", 10_000, 10.0, CPUS_PER_GPU)
        of_actors = {number * CPUS_PER_GPU: run(many, number, STRAGGLERS, 0.0) for number in (1, 16, 256)}
    shared.publish(WHAT, _report(sizes, outcomes, of_actors, works, load), chosen.report)


Outcomes = Mapping[tuple[str, int], Mapping[str, Outcome]]


def _report(
    sizes: Sequence[int],
    outcomes: Outcomes,
    of_actors: Mapping[int, Outcome],
    works: Sequence[DriverWork],
    load: float,
) -> str:
    worst = list(FAULTS)[-1]
    return "\n".join(
        [
            "# 100 million photos on 1 to 256 GPUs, simulated",
            "",
            (__doc__ or "").split("\n\n", 2)[2].replace("\n", " ").strip(),
            "",
            "## Hours",
            "",
            _hours_table(sizes, outcomes),
            "",
            f"By step, where {worst}:",
            "",
            _steps_table(sizes, outcomes, worst),
            "",
            "## The driver",
            "",
            "Processor time of the pool's own code, of the whole run (a share of 1 would be the limit):",
            "",
            _pool_table(sizes, outcomes, worst),
            "",
            "Its other work, done for real:",
            "",
            _works_table(works),
            "",
            _limit(works),
            "",
            "The pool with more actors, 10,000 units of 10 s, stragglers:",
            "",
            _actors_table(of_actors),
            "",
            *_assumptions(),
            "",
            "## Circumstances",
            "",
            shared.circumstances("simulate_cluster", load),
        ]
    )


def _steps_table(sizes: Sequence[int], outcomes: Outcomes, faults: str) -> str:
    names = [step.name for step in steps()]
    rows = []
    for number in sizes:
        by_step = outcomes[faults, number]
        lost, sent = (sum(getattr(its, name) for its in by_step.values()) for name in ("num_lost", "num_calls"))
        rows.append((str(number), *(f"{by_step[name].hours:.2f}" for name in names), f"{lost:,}", f"{sent:,}"))
    return shared.markdown_table(("GPUs", *names, "machines lost", "calls sent"), rows)


def _works_table(works: Sequence[DriverWork]) -> str:
    rows = [
        (
            work.what,
            f"{work.num_messages:,}",
            f"{work.seconds:.1f}",
            f"{1e6 * work.seconds / work.num_messages:,.2f}",
            f"{work.peak_bytes / 2**20:,.0f}",
        )
        for work in works
    ]
    return shared.markdown_table(("work", "messages", "seconds", "microseconds each", "MiB at the peak"), rows)


def _hours_table(sizes: Sequence[int], outcomes: Outcomes) -> str:
    rows = []
    for number in sizes:
        hours = [sum(its.hours for its in outcomes[name, number].values()) for name in FAULTS]
        first = [sum(its.hours for its in outcomes[name, 1].values()) for name in FAULTS]
        shares = [f"{of_one / number / its:.2f}" for of_one, its in zip(first, hours, strict=True)]
        cells = [cell for its, share in zip(hours, shares, strict=True) for cell in (f"{its:.2f}", share)]
        rows.append((str(number), *cells))
    heads = [cell for name in FAULTS for cell in (f"{name}: hours", "of ideal")]
    return shared.markdown_table(("GPUs", *heads), rows)


def _pool_table(sizes: Sequence[int], outcomes: Outcomes, worst: str) -> str:
    rows = []
    for number in sizes:
        found = outcomes[worst, number].values()
        driver_s, calls = sum(its.driver_s for its in found), sum(its.num_calls for its in found)
        share = driver_s / 3600 / sum(its.hours for its in found)
        rows.append((str(number), f"{driver_s:.1f}", f"{1e6 * driver_s / calls:.0f}", f"{share:.4f}"))
    return shared.markdown_table(("GPUs", "seconds", "microseconds a call", "share of the run"), rows)


def _limit(works: Sequence[DriverWork]) -> str:
    parts_per_s = PHOTOS_PER_S / _parts().photos_per_part
    text = (
        f"A GPU that describes {PHOTOS_PER_S:,.0f} photos a second finishes {parts_per_s:.1f} parts of "
        f"{_parts().photos_per_part} photos a second; {GPUS[-1]} GPUs finish {GPUS[-1] * parts_per_s:,.0f}. "
    )
    units_per_s = next((work.num_messages / work.seconds for work in works if "through Ray" in work.what), None)
    if units_per_s is None:
        return f"{text}How many units a second pass a real Ray was not measured in this run."
    return (
        f"{text}{units_per_s:,.0f} units a second went through Ray here, so a driver as fast as this would be the "
        f"limit at about {units_per_s / parts_per_s:,.0f} GPUs. Ray Data, which describes, has more work for each part "
        "than the pool has for a unit: expect fewer."
    )


def _actors_table(outcomes: Mapping[int, Outcome]) -> str:
    rows = [
        (
            f"{number:,}",
            f"{10_000 * 10 / number / 3600:.3f}",
            f"{its.hours:.3f}",
            f"{1e6 * its.driver_s / its.num_calls:.0f}",
            f"{its.driver_s / 3600 / its.hours:.3f}",
        )
        for number, its in outcomes.items()
    ]
    heads = ("actors", "hours of work / actors", "hours", "microseconds a call", "the pool's share")
    return shared.markdown_table(heads, rows)


def _assumptions() -> list[str]:
    return [
        "## Assumptions",
        "",
        f"- A machine has a GPU and {CPUS_PER_GPU} CPUs. A GPU describes {PHOTOS_PER_S:,.0f} photos and scores "
        f"{PAIRS_PER_S:,.0f} pairs a second: assumed, no GPU has run this. {NUM_QUERIES:,} queries have "
        f"{NUM_CANDIDATES} candidates each, all described anew.",
        f"- Learning takes {LEARN_S:.0f} s, filling a shard {FILL_S} s on two CPUs "
        "(`index_at_size_amd-epyc-2-cores_2026-11-23.md`), searching a group "
        f"{SEARCH_S:.0f} s (from the same report's time a query).",
        f"- {STRAGGLERS:.0%} of units straggle: 80 % of them take 1.5 to 2.5 times as long, 10 % up to 10 times, 10 % "
        "10 to 20 times. The shape is that of Ananthanarayanan et al., *Reining in the Outliers in Map-Reduce "
        "Clusters using Mantri*, OSDI 2010.",
        "- Machines are lost at 5 % and 33 % an hour, memorylessly. 33 % is the highest rate of the traces that "
        "Thorpe et al. replay in *Bamboo*, NSDI 2023 (spot GPUs, 10 to 33 % an hour). Both papers' figures are quoted "
        "from memory: check them before you rely on them.",
        f"- A machine is replaced in {BOOT_S:.0f} s, an actor starts in {START_S:.0f} s, and Ray takes "
        f"{NOTICE_S:.0f} s to say that a machine is dead.",
        f"- Describing is Ray Data's work. Here the pool does it, {PARTS_TOGETHER} parts a unit. Learning and filling "
        "are Ray tasks. Here they are units, too.",
        "- The store and the network are never the limit. Describing waits for no decoding.",
    ]


if __name__ == "__main__":
    main()
