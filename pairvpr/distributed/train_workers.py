"""Both training stages under Ray Train: workers that may die, checkpoints that outlive them.

Ray Train starts the workers and joins them in a process group. When a worker or one of Ray Train's own actors is lost,
the driver restarts training. Only the driver decides that, so no actor holds state that a run needs. Each start reads
the run's last checkpoint below `output`. Ray's own snapshots are not used and go to a temporary folder.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray import PlacementGroupID
from ray.exceptions import RayActorError, RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pairvpr.config.train_schema import TrainConfig, TrainStageOneConfig, TrainStageTwoConfig
from pairvpr.data import storage
from pairvpr.data.manifest import Benchmark
from pairvpr.data.training_sets.base import TrainingSet
from pairvpr.distributed import metrics
from pairvpr.distributed.runtime import ALONE, job_cpus
from pairvpr.distributed.validate import validate
from pairvpr.errors import IncompleteRunError, UserError
from pairvpr.machine import in_a_line
from pairvpr.models.pair_vpr import PairVPR
from pairvpr.models.weights import Weights
from pairvpr.terminal import bar, say
from pairvpr.training.checkpoint import steps_done
from pairvpr.training.context import Measured, TrainContext
from pairvpr.training.loop import Stage, run

JobConfig = TrainStageOneConfig | TrainStageTwoConfig
MakeStage = Callable[[JobConfig, list[TrainingSet], Weights, TrainContext], Stage[Any]]
POLL_S = 1.0
SECONDS_TO_TAKE_LINES = 10.0
TIMEOUT = timedelta(minutes=30)
"""Limit on collective waits, such as for a checkpoint of gigabytes on its way to remote storage."""
SECONDS_BEFORE_COMPLAINT = 10.0
MAX_STARTS_WITHOUT_PROGRESS = 5
NOT_PART_OF_A_RESULT = (
    "root",
    "start",
    "gldv2_csv",
    "max_steps",
    "activation_checkpointing",
    "accumulation_steps",
    "keep_every_epochs",
    "validation_batch_size",
    "checkpoint_every_steps",
    "log_every_steps",
    "validation",
    "wandb",
    "num_workers",
    "num_gpus_per_worker",
    "loader_processes",
    "max_failures",
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run, checked and ready; sent to every worker."""

    config: JobConfig
    output: str
    sets: list[TrainingSet]
    start: Weights
    validation: Benchmark | None
    make_stage: MakeStage
    num_steps: int

    def settings(self) -> dict[str, Any]:
        """The settings that decide the result, as plain values."""
        train = asdict(self.config.train)
        for name in NOT_PART_OF_A_RESULT:
            train.pop(name, None)
        train["datasets"] = [
            {"name": its.name, "num_places": len(its), "places_sha256": its.places_sha256} for its in self.sets
        ]
        train["start_sha256"] = self.start.sha256
        model = asdict(self.config.model)
        for name in ("weights", "scaled_decoding", "max_megapixels", "compile"):
            del model[name]  # training does not set it
        return {"stage": _stage_number(self.config), "train": _plain(train), "model": _plain(model)}

    def earlier_settings(self) -> dict[str, Any]:
        """The same settings in the form of earlier versions: the number of places of each set, without their order."""
        settings = self.settings()
        settings["train"]["datasets"] = {its.name: len(its) for its in self.sets}
        return settings


def _stage_number(config: JobConfig) -> int:
    return 1 if isinstance(config, TrainStageOneConfig) else 2


def _step(config: JobConfig) -> str:
    return f"train stage {_stage_number(config)}"


def fit(job: Job) -> None:
    """Train to the end from the last checkpoint, restarting after failures.

    Raises `UserError` for errors that a retry would not fix, and `IncompleteRunError` after `train.max_failures`
    failures or `MAX_STARTS_WITHOUT_PROGRESS` starts without a new checkpoint.
    """
    train, scaling = job.config.train, _scaling(job.config.train)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    make_lines = ray.remote(_Lines).options(num_cpus=0, max_restarts=-1, scheduling_strategy=here)
    lines: Any = make_lines.remote()
    settings = {"job": ray.put(job), "lines": lines}
    done, failures, in_vain = steps_done(job.output), 0, 0
    with (
        tempfile.TemporaryDirectory(prefix="pairvpr-") as folder,
        bar(_step(job.config), job.num_steps, "steps", already_done=done) as draw,
        _printed(lines, scaling, draw),
    ):
        while True:
            failure = _start(settings, scaling, str(Path(folder, str(failures))))
            before, done = done, steps_done(job.output)
            if done >= job.num_steps:
                return
            if isinstance(failure, UserError):
                raise failure
            failures, in_vain = failures + 1, 0 if done > before else in_vain + 1
            why = storage.reason(failure) if failure is not None else "the workers ended early"
            if failures > train.max_failures or in_vain >= MAX_STARTS_WITHOUT_PROGRESS:
                raise IncompleteRunError(
                    f"training stopped after step {done:,} of {job.num_steps:,}: {why} (attempt {failures}; the "
                    f"last {in_vain} wrote no new checkpoint). The last checkpoint is kept: run the same command again "
                    "to "
                    "continue from it"
                ) from failure
            say(f"training: {why}; restarting after step {done:,}")


def _start(settings: Mapping[str, Any], scaling: ScalingConfig, folder: str) -> Exception | None:
    """Start all workers and wait until they end; returns why they ended too early, or None.

    Waits while the cluster has no room for them.
    """
    trainer = TorchTrainer(
        _work,
        train_loop_config=dict(settings),
        torch_config=TorchConfig(timeout_s=int(TIMEOUT.total_seconds())),
        scaling_config=scaling,
        run_config=RunConfig(
            name="run", storage_path=folder, failure_config=FailureConfig(max_failures=0, controller_failure_limit=0)
        ),
    )
    while True:
        try:
            _in_a_thread(trainer.fit)
        except (ray.train.TrainingFailedError, RayError) as error:
            _free_places()
            if not _has_no_room(error):
                return _cause(error)
        else:
            return None


def _in_a_thread(work: Callable[[], object]) -> None:
    """Run `work` in another thread; in the main thread Ray Train would catch Ctrl-C and exit with 0."""
    outcome: Future[None] = Future()

    def run_it() -> None:
        try:
            work()
            outcome.set_result(None)
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run_it, daemon=True).start()
    outcome.result()


def _free_places() -> None:
    """End all workers and free their resources: a killed controller leaves both behind.

    Ray Train's own cleaner needs Ray's dashboard, which a local instance lacks. An id ends with that of its job.
    """
    job_id = ray.get_runtime_context().get_job_id()
    for hex_id, about in placement_group_table().items():
        if hex_id.endswith(job_id) and about["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(hex_id))))


def _has_no_room(error: BaseException) -> bool:
    return isinstance(error, ray.train.ControllerError) and isinstance(
        error.controller_failure, WorkerGroupStartupTimeoutError
    )


def _cause(error: Exception) -> Exception:
    """The error that a worker raised, preferably a user's error; otherwise why a worker or the controller died."""
    if isinstance(error, ray.train.WorkerGroupError):
        found = sorted(error.worker_failures.items())
        raised = [failure for _, failure in found if isinstance(failure, _WORKERS_OWN)]
        said = [failure for failure in raised if isinstance(failure, UserError)]
        if said or raised:
            return (said or raised)[0]
        return RuntimeError(f"{len(found)} of the workers died")
    if isinstance(error, RayActorError):
        return RuntimeError("Ray Train's controller died")
    if isinstance(error, ray.train.ControllerError):
        return RuntimeError(f"Ray Train failed: {in_a_line(error.controller_failure)}")
    return error


def _scaling(train: TrainConfig) -> ScalingConfig:
    """Workers and their resources. Raises `UserError` for more than a local Ray instance has.

    A cluster that scales up from zero has neither CPUs nor GPUs yet, so the settings must say what to reserve.
    """
    resources = ray.cluster_resources()
    if not resources.get("CPU") and (train.num_workers is None or train.num_gpus_per_worker is None):
        raise UserError(
            "the cluster has no CPUs until it scales up; expected train.num_workers and train.num_gpus_per_worker"
        )
    cpus, gpus = job_cpus() or 1.0, resources.get("GPU", 0.0)
    gpus_per_worker = train.num_gpus_per_worker
    if gpus_per_worker is None:
        gpus_per_worker = 1.0 if gpus else 0.0
    num_workers = train.num_workers
    if num_workers is None:
        fitting = int(gpus // gpus_per_worker) if gpus_per_worker else 1
        num_workers = min(max(1, fitting), train.global_batch_size)
    if ray.get_runtime_context().namespace == ALONE and num_workers * gpus_per_worker > gpus:
        raise UserError(
            f"train.num_workers={num_workers} with {gpus_per_worker:g} GPUs each: this machine has {gpus:g}; expected "
            "no more than that"
        )
    share = cpus / num_workers
    if gpus_per_worker:  # CPUs per GPU, on the node with the fewest
        share = min(
            (node["Resources"].get("CPU", 0.0) / count for node in ray.nodes() if (count := _gpus_of(node))),
            default=1.0,
        )
        share *= gpus_per_worker
    wanted_cpus = float(train.num_threads_per_worker + train.loader_processes)
    wanted = {"CPU": max(0.001, min(wanted_cpus, int(1000 * share) / 1000))}
    if gpus_per_worker:
        wanted["GPU"] = gpus_per_worker
    return ScalingConfig(num_workers=num_workers, use_gpu=bool(gpus_per_worker), resources_per_worker=wanted)


def _gpus_of(node: Mapping[str, Any]) -> float:
    return node["Resources"].get("GPU", 0.0) if node["Alive"] else 0.0


class _Lines:
    """Collects the workers' progress. If it dies, only what is in transit is lost."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.done: int | None = None

    def add(self, line: str) -> None:
        """A line of progress."""
        self.lines.append(line)

    def reached(self, step: int) -> None:
        """So many training steps are done."""
        self.done = step

    def take(self) -> tuple[list[str], int | None]:
        """The lines since the last call, and how many training steps are done, if that is known."""
        lines, self.lines = self.lines, []
        return lines, self.done


@contextmanager
def _printed(actor: Any, scaling: ScalingConfig, draw: Callable[[int], object]) -> Iterator[None]:
    """Print the lines of a `_Lines`, and draw its steps, while the block runs; says once if no worker starts."""
    ended = threading.Event()
    started_s = time.monotonic()

    def watch() -> None:
        silent = True
        while True:
            last = ended.wait(POLL_S)
            lines, done = list[str](), None
            with suppress(RayError):  # it is being restarted
                lines, done = ray.get(actor.take.remote(), timeout=SECONDS_TO_TAKE_LINES)
            if done is not None:
                draw(done)
            for line in lines:
                say(line)
            if silent and not lines and time.monotonic() - started_s > SECONDS_BEFORE_COMPLAINT:
                there = {name: ray.cluster_resources().get(name, 0) for name in ("CPU", "GPU")}
                wanted = f"{scaling.num_workers} workers of {scaling.resources_per_worker}"
                say(f"still waiting for {wanted}; the cluster has {there}")
                silent = False
            silent = silent and not lines
            if last:
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


class _WorkerError(Exception):
    """Why a worker failed, in one line; training is restarted."""


_WORKERS_OWN = (UserError, _WorkerError)


def _work(settings: Mapping[str, Any]) -> None:
    """One worker. Raises `UserError` for errors that a retry would not fix."""
    # Two process groups share a GPU. NCCL then runs their collectives in the order in which this process starts them.
    os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
    try:
        _run(ray.get(settings["job"]), settings["lines"])
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory: {storage.reason(error)}; expected a smaller batch for each worker (more workers), "
            "train.activation_checkpointing=true, or in stage one train.accumulation_steps=2"
        ) from error
    except UserError:
        raise
    except Exception as error:  # whose class may not be picklable
        raise _WorkerError(f"a worker failed: {in_a_line(error)}") from error


def _run(job: Job, lines: Any) -> None:
    train, world = job.config.train, ray.train.get_context()
    torch.set_num_threads(train.num_threads_per_worker)
    device = get_device()
    assert isinstance(device, torch.device)
    rank, world_size = world.get_world_rank(), world.get_world_size()
    benchmark = job.validation

    def recalls(model: PairVPR) -> dict[str, float]:
        assert benchmark is not None
        return validate(model, benchmark, train.validation_batch_size, context)

    context = TrainContext(
        rank=rank,
        world_size=world_size,
        device=device,
        output=job.output,
        settings=job.settings(),
        validate=None if benchmark is None else recalls,
        say=lambda line: lines.add.remote(line),
        measured=partial(_record, _step(job.config), lines),
        loses_a_machine=_Preemptions(),
        group=_own_group() if world_size > 1 else None,
    )
    run(job.make_stage(job.config, job.sets, job.start, context), train, context)


def _record(step: str, lines: Any, measured: Measured) -> None:
    """What a row of the log says, as metrics and in the terminal's bar."""
    lines.reached.remote(measured.step)
    metrics.PHOTOS.record(measured.num_photos, step=step)
    metrics.LOSS.record(measured.loss, step=step)
    metrics.show_progress(step, "steps", done=measured.step, total=measured.num_steps, rate_per_s=measured.steps_per_s)


class _Preemptions:
    """Whether Ray has announced since the last call that it loses a node with one of the workers.

    All workers call it together: Ray Train makes them agree.
    """

    def __init__(self) -> None:
        self._known: set[str] = set()

    def __call__(self) -> bool:
        found = ray.train.get_preemption_info()
        nodes = set() if found is None else set(found.preempted_node_ids)
        is_new = not nodes <= self._known
        self._known |= nodes
        return is_new


def _own_group() -> dist.ProcessGroup:
    """A process group in addition to the one used by DistributedDataParallel."""
    group = dist.new_group(timeout=TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _plain(value: Any) -> Any:
    """Replace enums by their names, as in JSON and checkpoints."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, str) else value
