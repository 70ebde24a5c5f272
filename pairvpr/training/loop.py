"""The training loop of both stages: batches, steps, metrics, checkpoints. Every rank runs it."""

from __future__ import annotations

import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from pairvpr.config.schema import Precision
from pairvpr.config.train_schema import TrainConfig
from pairvpr.data.samples import num_batches, rank_slice
from pairvpr.errors import UserError
from pairvpr.models.pair_vpr import PairVPR
from pairvpr.training import checkpoint as checkpoints
from pairvpr.training.checkpoint import Checkpoint, Position
from pairvpr.training.context import Measured, TrainContext
from pairvpr.training.metrics_log import MetricsLog
from pairvpr.training.optimizer import fused_alike

NUM_PHOTOS_NAMED = 5
Sample = TypeVar("Sample", covariant=True)


class NotFiniteError(UserError):
    """A loss is not finite; the run stops."""


class Sampler(Protocol[Sample]):
    """Samples as a function of epoch and position."""

    def __len__(self) -> int:
        """Samples of an epoch."""
        ...

    def sample(self, epoch: int, position: int) -> Sample:
        """The sample at a position of an epoch."""
        ...


@dataclass(frozen=True)
class StepResult:
    """Results of a step over all ranks; `counts` are summed over the run."""

    metrics: Mapping[str, float]
    num_photos: int
    counts: Mapping[str, int]


class Stage(ABC, Generic[Sample]):
    """The interface of a stage: what differs between the two."""

    number: int
    model: PairVPR
    optimizer: torch.optim.Optimizer
    sampler: Sampler[Sample]

    @abstractmethod
    def collate(self, samples: Sequence[Sample]) -> Any:
        """Samples -> a batch, on the CPU. Called in loader processes."""

    @abstractmethod
    def set_schedule(self, step: int) -> dict[str, float]:
        """Set the optimizer's learning rate and weight decay for a step (from 0); returns them for the log."""

    @abstractmethod
    def backward(self, batch: Any, scaler: torch.amp.GradScaler) -> Callable[[], StepResult]:
        """Forward and backward pass; gradients are those of the global batch afterwards.

        What it gives says what the step found, and waits for that: it is asked once the optimizer's work is queued.
        It raises `NotFiniteError`, on all ranks alike, that names the photos behind a loss that is no number.
        """


class _Samples(Dataset[Any]):
    """A sampler as a dataset for torch's DataLoader: indices are (epoch, position).

    A `UserError` is returned as a value: raised in a loader process, it would arrive wrapped in a traceback.
    """

    def __init__(self, sampler: Sampler[Any]) -> None:
        self.sampler = sampler

    def __getitem__(self, index: tuple[int, int]) -> Any:
        try:
            return self.sampler.sample(*index)
        except UserError as error:
            return error


def _collate(collate: Callable[[Sequence[Any]], Any], samples: Sequence[Any]) -> Any:
    return next((sample for sample in samples if isinstance(sample, UserError)), None) or collate(samples)


class _Batches:
    """The (epoch, position) of every sample in this rank's batches, from a position of the run to its end."""

    def __init__(self, start: Position, epochs: int, batches_per_epoch: int, batch_size: int, part: range) -> None:
        self.start, self.epochs, self.batches_per_epoch = start, epochs, batches_per_epoch
        self.batch_size, self.part = batch_size, part

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in range(self.start.epoch, self.epochs):
            first = self.start.batch if epoch == self.start.epoch else 0
            for batch in range(first, self.batches_per_epoch):
                yield [(epoch, batch * self.batch_size + i) for i in self.part]


class _Window:
    """Measures speed since the last row of the log."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.started_s, self.waited_s, self.num_photos = time.perf_counter(), 0.0, 0

    def next(self, batches: Iterator[Any]) -> Any:
        """The next batch, and the seconds spent waiting."""
        waiting_s = time.perf_counter()
        batch = next(batches)
        self.waited_s += time.perf_counter() - waiting_s
        if isinstance(batch, UserError):
            raise batch
        return batch

    def speed(self) -> dict[str, float]:
        """Values for the log; photos of all ranks."""
        elapsed_s = time.perf_counter() - self.started_s
        return {"images_per_s": self.num_photos / elapsed_s, "waiting_for_data": self.waited_s / elapsed_s}

    def measured(self, step: int, num_steps: int, loss: float) -> Measured:
        """The same for those who watch the run from outside, after a step."""
        steps_per_s = (step - self.step) / (time.perf_counter() - self.started_s)
        return Measured(step=step, num_steps=num_steps, loss=loss, num_photos=self.num_photos, steps_per_s=steps_per_s)


def run(stage: Stage[Any], config: TrainConfig, context: TrainContext) -> None:
    """Train from the last checkpoint, or from the start, to the end."""
    with deterministic_sums():
        _run(stage, config, context)


@contextmanager
def deterministic_sums() -> Iterator[None]:
    """Sum gradients of rows that are used twice in a fixed order.

    By default a CPU's threads race for it, so equal runs drift apart. On a GPU, attention's backward pass is ordered
    only where unordered sums are errors, not warnings. cuBLAS needs a workspace for it, and reads the variable at its
    first product.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    details: Any = torch.utils.deterministic
    fills_memory = details.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    details.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        details.fill_uninitialized_memory = fills_memory


def _run(stage: Stage[Any], config: TrainConfig, context: TrainContext) -> None:
    batches_per_epoch = num_batches(len(stage.sampler), config.global_batch_size)
    scaler = torch.amp.GradScaler(context.device.type, enabled=stage.model.config.precision is Precision.fp16)
    position, counts = _restore(stage, scaler, context)
    log = None
    if context.rank == 0:
        context.say(f"{context.world_size} worker(s) ready, continuing after step {position.step:,}")
        log = MetricsLog(context.output, position.step, wandb=config.wandb, settings=context.settings)
    batches = iter(_loader(stage, config, context, position, batches_per_epoch))
    last_step = min(config.epochs * batches_per_epoch, config.max_steps or math.inf)
    window = _Window(position.step)
    while position.step < last_step:
        batch = window.next(batches)
        row = {"step": position.step + 1, "epoch": position.epoch} | stage.set_schedule(position.step)
        result = _step(stage, batch, scaler, config, row)
        counts = {name: counts.get(name, 0) + count for name, count in result.counts.items()}
        window.num_photos += result.num_photos
        position = _next(position, batches_per_epoch)
        is_last = position.step == last_step
        is_logged = position.step % config.log_every_steps == 0 or is_last
        if log is not None and is_logged:
            log.add(row | dict(result.metrics) | counts | window.speed() | _gpu_memory(context.device))
            context.say(_line(log.rows[-1], last_step))
            context.measured(window.measured(position.step, int(last_step), log.rows[-1]["loss"]))
            window = _Window(position.step)
        is_due = is_last or (is_logged and context.loses_a_machine())
        _after_step(stage, scaler, config, context, position, counts, log, is_last=is_last, is_due=is_due)
    if log is not None:
        log.close()


def _line(row: Mapping[str, Any], last_step: float) -> str:
    return (
        f"step {row['step']:,} of {last_step:,}, loss {row['loss']:.4f}, {row['images_per_s']:.0f} images/s, "
        f"waiting for data {row['waiting_for_data']:.0%}"
    )


def _next(position: Position, batches_per_epoch: int) -> Position:
    epoch, batch = position.epoch, position.batch + 1
    return Position(*((epoch, batch) if batch < batches_per_epoch else (epoch + 1, 0)), position.step + 1)


def _loader(
    stage: Stage[Any], config: TrainConfig, context: TrainContext, start: Position, batches_per_epoch: int
) -> DataLoader[Any]:
    part = rank_slice(config.global_batch_size, context.rank, context.world_size)
    return DataLoader(
        _Samples(stage.sampler),
        batch_sampler=_Batches(start, config.epochs, batches_per_epoch, config.global_batch_size, part),  # pyright: ignore[reportArgumentType]
        collate_fn=partial(_collate, stage.collate),
        num_workers=config.loader_processes,
        pin_memory=context.device.type == "cuda",
    )


def _step(
    stage: Stage[Any], batch: Any, scaler: torch.amp.GradScaler, config: TrainConfig, row: Mapping[str, Any]
) -> StepResult:
    """One step of the optimizer. If its loss is no number, neither are the weights afterwards: the run ends."""
    stage.optimizer.zero_grad(set_to_none=True)
    found = stage.backward(batch, scaler)
    norm = None
    if config.clip_grad is not None:
        scaler.unscale_(stage.optimizer)
        trained = [parameter for parameter in stage.model.parameters() if parameter.grad is not None]
        norm = nn.utils.clip_grad_norm_(trained, config.clip_grad)
    scaler.step(stage.optimizer)
    scaler.update()
    try:
        result = found()
    except NotFiniteError as error:
        raise NotFiniteError(
            f"the loss of step {row['step']} is not finite (lr {row['lr']:.3g}); photos: {error}; the last "
            "checkpoint is kept. Expected a lower learning rate, train.clip_grad, or model.precision=bf16 or fp32, in "
            "another output"
        ) from error
    if norm is None:
        return result
    return replace(result, metrics={**result.metrics, "gradient_norm": float(norm)})


def _after_step(
    stage: Stage[Any],
    scaler: torch.amp.GradScaler,
    config: TrainConfig,
    context: TrainContext,
    position: Position,
    counts: Mapping[str, int],
    log: MetricsLog | None,
    *,
    is_last: bool,
    is_due: bool,
) -> None:
    """Validation at the end of an epoch, and the checkpoints: at its end, every so many steps, and when one is due."""
    ends_epoch = position.batch == 0
    every = config.checkpoint_every_steps
    if not (ends_epoch or is_due or (every is not None and position.step % every == 0)):
        return
    if ends_epoch and context.validate is not None:
        recalls = context.validate(stage.model)
        if log is not None:
            log.add({"step": position.step, "epoch": position.epoch - 1} | recalls)
            named = ", ".join(f"{name} {value:.1f}" for name, value in recalls.items())
            context.say(f"validation after epoch {position.epoch}: {named}")
    if not all(tensor.isfinite().all() for tensor in stage.model.parameters()):  # the same on every rank
        raise NotFiniteError(f"the weights after step {position.step} are not finite; the last checkpoint is kept")
    if log is not None:
        content = Checkpoint(
            stage=stage.number,
            position=position,
            counts=counts,
            settings=context.settings,
            model=stage.model.state_dict(),
            optimizer=stage.optimizer.state_dict(),
            scaler=scaler.state_dict(),
        )
        log.publish()
        if is_last or (ends_epoch and position.epoch % config.keep_every_epochs == 0):
            checkpoints.save(checkpoints.kept_url(context.output, position), content)
        checkpoints.save_last(context.output, content)
    context.wait()


def _restore(
    stage: Stage[Any], scaler: torch.amp.GradScaler, context: TrainContext
) -> tuple[Position, Mapping[str, int]]:
    """Load the last checkpoint's state, if there is one, into stage and scaler; returns its position and counts.

    Raises `UserError` if ranks see different checkpoints: they would train different networks.
    """
    try:
        found = checkpoints.load(checkpoints.last_url(context.output), stage.number, "output")
    except FileNotFoundError:
        found = None
    seen = context.gather(None if found is None else found.position.step)
    if len(set(seen)) > 1:
        raise UserError(
            f"output={context.output}: the workers see different checkpoints there (steps {seen}); expected a URL, or "
            "a folder that every node sees"
        )
    if found is None:
        return Position(), {}
    stage.model.load_state_dict(found.model, strict=True)
    stage.optimizer.load_state_dict(fused_alike(found.optimizer, stage.optimizer))
    if found.scaler:
        scaler.load_state_dict(dict(found.scaler))
    return found.position, found.counts


def _gpu_memory(device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return {}
    return {"gpu_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}


def distributed(step: nn.Module, context: TrainContext) -> nn.Module:
    """The step with gradients averaged over ranks, if there are several."""
    if context.world_size == 1:
        return step
    device_ids = [context.device] if context.device.type == "cuda" else None
    return DistributedDataParallel(step, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True)


def name_photos(names: Sequence[str]) -> str:
    """The first few items, for a message."""
    more = len(names) - NUM_PHOTOS_NAMED
    return ", ".join(names[:NUM_PHOTOS_NAMED]) + (f" and {more} more" if more > 0 else "")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device, without waiting if the tensor is pinned."""
    return tensor.to(device, non_blocking=True)
