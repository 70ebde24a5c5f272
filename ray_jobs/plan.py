"""`pairvpr plan plan.num_images=2805840 model=vitb`: sizes, memory and hours, before anything is run."""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import ray

from pairvpr.cli import run_job
from pairvpr.config.compose import load
from pairvpr.config.schema import IVF_KINDS, IndexKind, ModelConfig, PlanConfig
from pairvpr.data import storage
from pairvpr.data.benchmarks import load_benchmark
from pairvpr.data.claim import check_writable_file
from pairvpr.data.manifest import Manifest
from pairvpr.distributed.capacity import room
from pairvpr.distributed.describe import Description, describe
from pairvpr.distributed.network import ModelSource, NetworkSource, UserNetworkSource
from pairvpr.distributed.runtime import plan_actors, ray_session
from pairvpr.errors import UserError
from pairvpr.index.plan import Plan, Room, plan_index, table
from pairvpr.index.plan_cost import KINDS as COSTED_KINDS
from pairvpr.index.plan_cost import KindCost, Machines, Rates, Store, Work, cost_table, plan_cost
from pairvpr.index.plan_dense import dense_table, plan_dense
from pairvpr.index.speed import measured_cpu_rates
from pairvpr.models.weights import Weights, untrained_state
from pairvpr.retrieval.first_stage import FirstStage
from pairvpr.terminal import say
from pairvpr.toy import city as toy_city
from ray_jobs.run import other_first_stage
from ray_jobs.steps import memory_budget_bytes

WIDTH_PX, HEIGHT_PX, JPEG_QUALITY = 640, 480, 90
NUM_DRAWN = 64
"""Distinct calibration photos; a longer calibration repeats them."""
BATCHES_PER_ACTOR = 4
ENOUGH_S = 5.0
MOST_PHOTOS = 100_000
LONGEST_S = 30.0
"""No measurement is repeated with more photos where that would probably take longer, all together."""


@dataclass(frozen=True)
class Throughput:
    """A measurement: `num_timed` photos in `seconds`, the last ones of `num_photos`."""

    num_photos: int
    num_timed: int
    seconds: float
    start_included: bool

    @property
    def images_per_s(self) -> float:
        """Photos per second of all actors together."""
        return self.num_timed / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        which = "start included" if self.start_included else f"the last {self.num_timed:,} timed"
        return f"measured: {self.num_photos:,} drawn photos of {WIDTH_PX} x {HEIGHT_PX}, {which}"


def main(arguments: Sequence[str]) -> None:
    """One plan; it is not an error if the plan does not fit."""
    plan(load(PlanConfig, arguments))


def plan(config: PlanConfig) -> dict[str, Any]:
    """Print the plan as a table and as JSON, write the JSON to `output` if given, and return it.

    Ray is started only to find what is not given: the speed, and the memory for an index.
    """
    if config.output is not None:
        check_writable_file(config.output, "output", "the plan as JSON")
    (num_images, num_queries), images_per_s = _numbers(config), config.plan.images_per_s
    first = other_first_stage(config)
    model = config.model if first is None else replace(config.model, name=first.name, descriptor_dim=first.width)
    is_measured = images_per_s is None and (first is None or first.file is None)
    needs_ray = is_measured or config.index.memory_budget_gib is None
    calibration = None
    with ray_session(config.cluster) if needs_ray else nullcontext():
        there = room() if needs_ray else Room()
        budget_bytes = memory_budget_bytes(config.index)
        if is_measured:
            calibration = measured_throughput(config, first)
            images_per_s = calibration.images_per_s
    speeds = _Speeds.of(first, images_per_s, reranks=num_queries is not None)
    made = plan_index(num_images, model, config.index, budget_bytes=budget_bytes, images_per_s=speeds.first_stage)
    problems, dense, costs = made.problems(there), None, None
    if num_queries is not None:
        dense = plan_dense(num_images, num_queries, config.plan.num_candidates, config.model, speeds.pair_network)
    if config.plan.price_per_hour is not None:
        costs = _Costs.of(config, made, model, there, num_queries, speeds)
    content = made.as_json() | {
        "calibration": None if calibration is None else asdict(calibration),
        "nodes": [asdict(node) for node in there.nodes],
        "dense_run": None if dense is None else asdict(dense),
        "costs": None if costs is None else costs.as_json(),
        "remarks": list(speeds.remarks),
        "problems": problems,
    }
    print(table(made, str(calibration or "plan.images_per_s")))
    if dense is not None:
        print(f"\n{dense_table(dense)}")
    if costs is not None:
        print(f"\n{costs.table()}")
    print("".join(f"{line}\n" for line in (*speeds.remarks, *(f"no room: {problem}" for problem in problems))))
    print(json.dumps(content, indent=2), flush=True)
    if config.output is not None:
        _write(config.output, content)
    return content


@dataclass(frozen=True)
class _Speeds:
    """Photos per second of the whole cluster (None = unknown).

    One given or measured speed is that of a single network: Pair-VPR's, which is then both, or the user's.
    """

    first_stage: float | None
    pair_network: float | None
    rows_from_file: bool = False
    remarks: Sequence[str] = ()
    """One line for what the plan does not know."""

    @classmethod
    def of(cls, first: FirstStage | None, images_per_s: float | None, *, reranks: bool) -> _Speeds:
        if first is None:
            return cls(images_per_s, images_per_s)
        if first.file is None:
            line = (
                "descriptor.module: the speed is that of your network; how fast Pair-VPR's describes what is re-ranked "
                "is unknown (plan without descriptor.module to know)"
            )
            return cls(images_per_s, None, remarks=[line] if reranks else [])
        lines = [
            "describe.descriptors: rows are copied and no photo is described; the memory to gather and the most "
            "storage are upper bounds"
        ]
        if reranks:
            known = "is unknown without" if images_per_s is None else "is"
            lines.append(
                "describe.descriptors: the speed of Pair-VPR's network, which describes what is re-ranked, "
                f"{known} plan.images_per_s"
            )
        return cls(None, images_per_s, rows_from_file=True, remarks=lines)


@dataclass(frozen=True)
class _Costs:
    """What the planned index costs as each kind, and what that was reckoned from."""

    kinds: list[KindCost]
    machines: Machines
    store: Store
    rates: Rates

    @classmethod
    def of(
        cls,
        config: PlanConfig,
        made: Plan,
        model: ModelConfig,
        there: Room,
        num_queries: int | None,
        speeds: _Speeds,
    ) -> _Costs:
        """Measures how fast a CPU of this machine compares descriptors."""
        asked = config.plan
        assert asked.price_per_hour is not None
        machines = Machines(
            number=asked.num_machines or len(there.nodes) or 1,
            cpus_each=asked.cpus_per_machine
            or max((node.num_cpus for node in there.nodes), default=os.cpu_count() or 1),
            price_per_hour=asked.price_per_hour,
        )
        store = Store(
            photo_bytes=asked.photo_kib * 1024,
            price_per_gib_read=asked.price_per_gib_read,
            price_per_gib_month=asked.price_per_gib_month,
        )
        kinds = [each.kind for each in made.kinds if each.kind in COSTED_KINDS and each.num_lists <= made.num_images]
        say("costs: measuring how fast a CPU compares descriptors")
        cpu = measured_cpu_rates(made.descriptor_dim, kinds)
        rates = Rates(
            images_per_s=speeds.first_stage, dense_per_s=speeds.pair_network, pairs_per_s=asked.pairs_per_s, cpu=cpu
        )
        work = Work(num_queries, asked.num_candidates, config.index.num_build_threads, speeds.rows_from_file)
        plans = [_as_kind(kind, config, made, model) for kind in kinds]
        return cls([plan_cost(each, machines, store, rates, work) for each in plans], machines, store, rates)

    def table(self) -> str:
        return cost_table(self.kinds, self.machines, self.store)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def _as_kind(kind: IndexKind, config: PlanConfig, made: Plan, model: ModelConfig) -> Plan:
    num_lists = config.index.num_lists if kind in IVF_KINDS else None
    return plan_index(
        made.num_images,
        model,
        replace(config.index, kind=kind, num_lists=num_lists),
        budget_bytes=made.budget_bytes,
        images_per_s=made.images_per_s,
    )


def _numbers(config: PlanConfig) -> tuple[int, int | None]:
    """Number of photos in the database, and of queries if known."""
    asked = config.plan
    if config.benchmark is None:
        assert asked.num_images is not None
        return asked.num_images, asked.num_queries
    benchmark = load_benchmark(config.benchmark, storage.absolute(config.output or "plan"))
    return len(benchmark.database), asked.num_queries or len(benchmark.queries)


def _write(output: str, content: dict[str, Any]) -> None:
    try:
        storage.write_json(output, content)
    except OSError as error:
        raise UserError(f"output={output}: can't be written: {storage.reason(error)}") from error


def measured_throughput(config: PlanConfig, first: FirstStage | None = None) -> Throughput:
    """Describe generated photos with the network of `first`, or Pair-VPR's, untrained; nothing is kept.

    Speed does not depend on weights.

    Only the second half is timed, when the actors have started and used up the photos decoded meanwhile. The photos
    are in the page cache, so slow photo storage is not measured.
    """
    _check_shared(config.output)
    asked = config.plan.calibration_photos
    batches = BATCHES_PER_ACTOR * plan_actors(config.describe).num_actors
    number = asked or max(NUM_DRAWN, batches * config.describe.batch_size)
    source = _source(config, first)
    with _scratch(config.output) as directory:
        paths = _draw(storage.join(directory, "photos"), min(number, NUM_DRAWN))
        started_s = time.monotonic()
        while True:
            began_s = time.monotonic()
            measured = _measured(config, source, directory, [paths[i % len(paths)] for i in range(number)])
            now_s = time.monotonic()
            affordable = int(number * (LONGEST_S - (now_s - started_s)) / (now_s - began_s))
            if asked or measured.seconds >= ENOUGH_S or number >= MOST_PHOTOS or affordable <= number:
                return measured
            number = min(MOST_PHOTOS, affordable, max(2 * number, int(3 * ENOUGH_S * measured.images_per_s)))


def _source(config: PlanConfig, first: FirstStage | None) -> NetworkSource:
    """The network that is measured."""
    if first is not None and first.user_network is not None:
        return UserNetworkSource(first.user_network)
    arrays = {name: tensor.numpy() for name, tensor in untrained_state(config.model).items()}
    return ModelSource(config.model, ray.put(Weights(arrays, "", untrained=True)))


def _check_shared(output: str | None) -> None:
    """Raise `UserError` if other machines could not see photos in this machine's temporary folder."""
    here = ray.get_runtime_context().get_node_id()
    others = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU") and node["NodeID"] != here]
    if others and output is None:
        raise UserError(
            "the cluster has several machines, and all of them must see the calibration photos; expected output=... on "
            "a shared file system or a URL (the photos are kept next to it), or plan.images_per_s=..."
        )


@contextmanager
def _scratch(output: str | None) -> Iterator[str]:
    """A directory for the calibration, deleted afterwards."""
    if output is None:
        with tempfile.TemporaryDirectory(prefix="pairvpr-") as folder:
            yield folder
        return
    directory = f"{storage.absolute(output)}.{uuid.uuid4().hex}"
    try:
        yield directory
    finally:
        storage.remove_tree(directory)


def _draw(folder: str, num_photos: int) -> list[str]:
    """Paths of generated photos in `folder`."""
    say(f"calibration: drawing {num_photos} photos")
    places = -(-num_photos // len(toy_city.DATABASE_DAYS))
    photos = toy_city.database_photos(seed=0, num_places=places)[:num_photos]
    for photo in photos:
        sink = io.BytesIO()
        toy_city.draw(photo, width_px=WIDTH_PX, height_px=HEIGHT_PX).save(sink, "JPEG", quality=JPEG_QUALITY)
        storage.write_bytes(storage.join(folder, photo.path), sink.getvalue())
    return [photo.path for photo in photos]


def _measured(config: PlanConfig, source: NetworkSource, directory: str, paths: list[str]) -> Throughput:
    """Describe the photos at `paths` as a run would, in one shard."""
    photos = Manifest.of(storage.join(directory, "photos"), paths)
    description = Description(photos, storage.join(directory, f"{len(paths)}"), 1, source, config.describe)
    finished = [(time.perf_counter(), 0)]
    describe(
        description,
        "for calibration",
        needs_a_readable_photo=True,
        on_finished=lambda num_done: finished.append((time.perf_counter(), num_done)),
    )
    end_s, num_photos = finished[-1]
    start_s, num_before = next((at for at in finished if 2 * at[1] >= num_photos and at[1] < num_photos), finished[0])
    return Throughput(num_photos, num_photos - num_before, end_s - start_s, start_included=num_before == 0)


if __name__ == "__main__":
    sys.exit(run_job("plan"))
