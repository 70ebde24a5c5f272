"""Both training stages under Ray Train: workers that may die, checkpoints that outlive them.

Ray Train starts the workers, joins them in a process group, and starts them all again when one is lost. What a run
goes on from is its own last checkpoint below `output`, which each start reads; Ray's snapshots are never needed and
lie in a temporary folder.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from pairvpr.config.train_schema import TrainConfig, TrainStageOneConfig, TrainStageTwoConfig
from pairvpr.data import storage
from pairvpr.data.benchmarks import load_benchmark, prepare_benchmark
from pairvpr.data.claim import check_claim, check_writable, claim
from pairvpr.data.manifest import Benchmark
from pairvpr.data.training_sets.base import TrainingSet
from pairvpr.data.training_sets.read import read_training_sets
from pairvpr.distributed.progress import say
from pairvpr.distributed.runtime import ray_session
from pairvpr.distributed.validate import validate
from pairvpr.errors import IncompleteRunError, UserError
from pairvpr.models.pair_vpr import PairVPR
from pairvpr.models.weights import Weights
from pairvpr.training import stage_one, stage_two
from pairvpr.training.context import TrainContext
from pairvpr.training.loop import Stage, run
from pairvpr.training.metrics_log import check_wandb, read_metrics

JobConfig = TrainStageOneConfig | TrainStageTwoConfig
MakeStage = Callable[[JobConfig, list[TrainingSet], Weights, TrainContext], Stage[Any]]
POLL_S = 1.0
NOT_PART_OF_A_RESULT = (
    "root",
    "start",
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
            train.pop(name)
        train["datasets"] = {training_set.name: len(training_set) for training_set in self.sets}
        train["start_sha256"] = self.start.sha256
        model = asdict(self.config.model)
        del model["weights"]
        return {"stage": self.make_stage.__name__, "train": _plain(train), "model": _plain(model)}


def train_stage_one(config: TrainStageOneConfig) -> None:
    """Place-aware pre-training; see `docs/training.md`."""
    _train(config, [str(name) for name in config.train.datasets], stage_one.make_stage, stage_one.start_weights)


def train_stage_two(config: TrainStageTwoConfig) -> None:
    """Descriptor and pair classifier; see `docs/training.md`."""
    _train(config, ["gsv_cities"], stage_two.make_stage, stage_two.start_weights)


def _train(config: Any, datasets: list[str], make_stage: Any, start_weights: Callable[[Any], Weights]) -> None:
    train: TrainConfig = config.train
    output = storage.absolute(config.output)
    check_writable(output, "output")
    if train.wandb:
        check_wandb()
    validation = None if train.validation is None else load_benchmark(train.validation, output)
    sets = read_training_sets(datasets, storage.absolute(train.root), storage.join(output, "cache"))
    num_places = sum(len(training_set) for training_set in sets)
    batches_per_epoch = num_places // train.global_batch_size
    if not batches_per_epoch:
        raise UserError(
            f"train.global_batch_size={train.global_batch_size}: the training sets have only {num_places:,} places; "
            "expected a batch that fits into an epoch"
        )
    num_steps = min(train.epochs * batches_per_epoch, train.max_steps or train.epochs * batches_per_epoch)
    job = Job(
        config=config,
        output=output,
        sets=sets,
        start=start_weights(config),
        validation=validation,
        make_stage=make_stage,
        num_steps=num_steps,
    )
    check_claim(output, job.settings(), "output")
    if _steps_done(output) >= num_steps:
        say(f"training: finished earlier ({num_steps:,} steps), skipped")
        return
    with ray_session(config.cluster):
        claim(output, job.settings(), "output")
        if train.validation is not None:
            prepare_benchmark(train.validation, output)
        say(f"training: {num_places:,} places, {batches_per_epoch:,} steps an epoch, {num_steps:,} steps in all")
        _fit(job)


def _steps_done(output: str) -> int:
    rows = read_metrics(output)
    return int(rows[-1]["step"]) if rows else 0


def _fit(job: Job) -> None:
    """Run Ray Train to the end. Raises `UserError` for what a worker said, `IncompleteRunError` for lost runs."""
    train = job.config.train
    board: Any = ray.remote(_Board).options(num_cpus=0, max_restarts=-1).remote()
    with tempfile.TemporaryDirectory(prefix="pairvpr-") as folder, _printed(board):
        trainer = TorchTrainer(
            _work,
            train_loop_config={"job": ray.put(job), "board": board},
            torch_config=TorchConfig(),
            scaling_config=_scaling(train),
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
    said = ray.get(board.failure.remote())
    if said is not None:
        raise UserError(said)
    done = _steps_done(job.output)
    if failure is not None or done < job.num_steps:
        reason = storage.reason(failure) if failure is not None else "the workers ended early"
        raise IncompleteRunError(
            f"training stopped after step {done:,} of {job.num_steps:,}: {reason}. The last checkpoint is kept: the "
            "same line again goes on from it"
        )


def _scaling(train: TrainConfig) -> ScalingConfig:
    resources = ray.cluster_resources()
    gpus = resources.get("GPU", 0.0)
    gpus_per_worker = train.num_gpus_per_worker
    if gpus_per_worker is None:
        gpus_per_worker = 1.0 if gpus else 0.0
    num_workers = train.num_workers
    if num_workers is None:
        num_workers = max(1, int(gpus // gpus_per_worker)) if gpus_per_worker else 1
    if num_workers > train.global_batch_size:
        raise UserError(
            f"train.global_batch_size={train.global_batch_size} is smaller than the {num_workers} workers: "
            "expected at least one sample for each worker"
        )
    cpus = resources.get("CPU", 1.0)
    wanted = {"CPU": max(0.001, min(float(train.num_threads_per_worker), int(1000 * cpus / num_workers) / 1000))}
    if gpus_per_worker:
        wanted["GPU"] = gpus_per_worker
    return ScalingConfig(num_workers=num_workers, use_gpu=bool(gpus_per_worker), resources_per_worker=wanted)


class _Board:
    """Where workers write what people should read."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.said: str | None = None

    def add(self, line: str) -> None:
        """A line of progress."""
        self.lines.append(line)

    def take(self) -> list[str]:
        """The lines since the last call."""
        lines, self.lines = self.lines, []
        return lines

    def fail(self, message: str) -> None:
        """The run can't go on, and trying again would not help."""
        self.said = message

    def failure(self) -> str | None:
        """What `fail` said."""
        return self.said


@contextmanager
def _printed(board: Any) -> Iterator[None]:
    """Print the board's lines while the block runs."""
    ended = threading.Event()

    def watch() -> None:
        while True:
            last = ended.wait(POLL_S)
            for line in ray.get(board.take.remote()):
                say(line)
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
    if ray.get(board.failure.remote()) is not None:
        return
    job: Job = ray.get(settings["job"])
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
    group = dist.new_group()
    assert isinstance(group, dist.ProcessGroup)
    return group


def _plain(value: Any) -> Any:
    """Enums as their names: what JSON and a checkpoint hold."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, str) else value
