"""Both training stages under Ray Train: workers that may die, checkpoints that outlive them.

Ray Train starts the workers, joins them in a process group, and starts them all again when one is lost. What a run
goes on from is its own last checkpoint below `output`, which each start reads; Ray's snapshots are never needed and
lie in a temporary folder.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pairvpr.config.train_schema import TrainConfig, TrainStageOneConfig, TrainStageTwoConfig
from pairvpr.data import storage
from pairvpr.data.manifest import Benchmark
from pairvpr.data.training_sets.base import TrainingSet
from pairvpr.distributed.progress import say
from pairvpr.distributed.runtime import ALONE
from pairvpr.distributed.validate import validate
from pairvpr.errors import IncompleteRunError, UserError
from pairvpr.models.pair_vpr import PairVPR
from pairvpr.models.weights import Weights
from pairvpr.training.checkpoint import steps_done
from pairvpr.training.context import TrainContext
from pairvpr.training.loop import Stage, run

JobConfig = TrainStageOneConfig | TrainStageTwoConfig
MakeStage = Callable[[JobConfig, list[TrainingSet], Weights, TrainContext], Stage[Any]]
POLL_S = 1.0
TIMEOUT = timedelta(minutes=30)
"""Of what the ranks wait for together: a checkpoint of gigabytes on its way to a store."""
SECONDS_BEFORE_COMPLAINT = 60.0
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
    """One training run, checked and ready: what every worker gets."""

    config: JobConfig
    output: str
    sets: list[TrainingSet]
    start: Weights
    validation: Benchmark | None
    make_stage: MakeStage
    num_steps: int

    def settings(self) -> dict[str, Any]:
        """What decides the result, in plain values."""
        train = asdict(self.config.train)
        for name in NOT_PART_OF_A_RESULT:
            train.pop(name, None)
        train["datasets"] = {training_set.name: len(training_set) for training_set in self.sets}
        train["start_sha256"] = self.start.sha256
        model = asdict(self.config.model)
        del model["weights"], model["scaled_decoding"]  # which training refuses
        stage = 1 if isinstance(self.config, TrainStageOneConfig) else 2
        return {"stage": stage, "train": _plain(train), "model": _plain(model)}


def fit(job: Job) -> None:
    """Run Ray Train to the end. Raises `UserError` for what a worker said, `IncompleteRunError` for lost runs."""
    train, scaling = job.config.train, _scaling(job.config.train)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    make_board = ray.remote(_Board).options(num_cpus=0, scheduling_strategy=here)
    board: Any = make_board.remote()
    with tempfile.TemporaryDirectory(prefix="pairvpr-") as folder, _printed(board, scaling):
        trainer = TorchTrainer(
            _work,
            train_loop_config={"job": ray.put(job), "board": board},
            torch_config=TorchConfig(timeout_s=int(TIMEOUT.total_seconds())),
            scaling_config=scaling,
            run_config=RunConfig(
                name="run",
                storage_path=str(Path(folder)),
                failure_config=FailureConfig(max_failures=train.max_failures),
            ),
        )
        failure: Exception | None = None
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            failure = error
    said, last_error = ray.get(board.outcome.remote())
    if said is not None:
        raise UserError(said)
    done = steps_done(job.output)
    if failure is not None or done < job.num_steps:
        reason = last_error or (storage.reason(failure) if failure is not None else "the workers ended early")
        raise IncompleteRunError(
            f"training stopped after step {done:,} of {job.num_steps:,}: {reason}. The last checkpoint is kept: the "
            "same line again goes on from it"
        )


def _scaling(train: TrainConfig) -> ScalingConfig:
    """Workers and what each reserves. Raises `UserError` for more than a Ray of its own will ever have."""
    resources = ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 1.0), resources.get("GPU", 0.0)
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
    if gpus_per_worker:  # the CPUs that lie beside a GPU, on the node that has the fewest
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


class _Board:
    """Where workers write what people should read, and where is decided whether to try again."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.said: str | None = None
        self.last_error: str | None = None
        self.last_start, self.starts_without_progress = -1, 0

    def add(self, line: str) -> None:
        """A line of progress."""
        self.lines.append(line)

    def take(self) -> list[str]:
        """The lines since the last call."""
        lines, self.lines = self.lines, []
        return lines

    def fail(self, message: str) -> None:
        """The run can't go on, and trying again would not help."""
        self.said = self.said or message

    def record(self, error: str) -> None:
        """What ended a worker; it will be tried again."""
        self.last_error = error
        self.lines.append(f"a worker failed: {error}")

    def may_start(self, step: int) -> bool:
        """Whether workers should begin after `step`: not after `fail`, nor again and again without progress."""
        self.starts_without_progress = self.starts_without_progress + 1 if step == self.last_start else 0
        self.last_start = step
        if self.starts_without_progress >= MAX_STARTS_WITHOUT_PROGRESS:
            cause = self.last_error or "the workers died without a word"
            self.fail(f"the workers started {MAX_STARTS_WITHOUT_PROGRESS} times after step {step} and failed: {cause}")
        return self.said is None

    def outcome(self) -> tuple[str | None, str | None]:
        """What `fail` said, and the last recorded error."""
        return self.said, self.last_error


@contextmanager
def _printed(board: Any, scaling: ScalingConfig) -> Iterator[None]:
    """Print the board's lines while the block runs; complain once if nothing starts."""
    ended = threading.Event()
    started_s = time.monotonic()

    def watch() -> None:
        silent = True
        while True:
            last = ended.wait(POLL_S)
            lines = ray.get(board.take.remote())
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


def _work(settings: Mapping[str, Any]) -> None:
    """One worker. What trying again would not mend goes to the board, and ends the run at the next start."""
    board = settings["board"]
    job: Job = ray.get(settings["job"])
    starts = [None]
    if ray.train.get_context().get_world_rank() == 0:
        starts = [ray.get(board.may_start.remote(steps_done(job.output)))]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(starts, src=0, device=get_device())
    if not starts[0]:
        return
    try:
        _run(job, board)
    except torch.OutOfMemoryError as error:
        ray.get(
            board.fail.remote(
                f"out of GPU memory: {storage.reason(error)}; expected a smaller batch for each worker (more workers), "
                "train.activation_checkpointing=true, or in stage one train.accumulation_steps=2"
            )
        )
        raise
    except UserError as error:
        ray.get(board.fail.remote(str(error)))
        raise
    except Exception as error:
        ray.get(board.record.remote(f"{type(error).__name__}: {storage.reason(error)}"))
        raise


def _run(job: Job, board: Any) -> None:
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
        say=lambda line: board.add.remote(line),
        group=_own_group() if world_size > 1 else None,
    )
    run(job.make_stage(job.config, job.sets, job.start, context), train, context)


def _own_group() -> dist.ProcessGroup:
    """A process group beside the one that DistributedDataParallel uses."""
    group = dist.new_group(timeout=TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _plain(value: Any) -> Any:
    """Enums as their names: what JSON and a checkpoint hold."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, str) else value
