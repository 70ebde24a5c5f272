"""The loop of both stages: batches in, steps, metrics, checkpoints. Every rank runs it."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from pairvpr.config.schema import Precision
from pairvpr.config.train_schema import TrainConfig
from pairvpr.data.samples import rank_slice
from pairvpr.errors import UserError
from pairvpr.models.pair_vpr import PairVPR
from pairvpr.training import checkpoint as checkpoints
from pairvpr.training.checkpoint import Checkpoint, Position
from pairvpr.training.context import TrainContext
from pairvpr.training.metrics_log import MetricsLog

NUM_PHOTOS_NAMED = 5
Sample = TypeVar("Sample", covariant=True)


class NotFiniteError(UserError):
    """A loss that is no number; the run stops."""


class Sampler(Protocol[Sample]):
    """Samples as a function of epoch and position."""

    def __len__(self) -> int:
        """Samples of an epoch."""
        ...

    def sample(self, epoch: int, position: int) -> Sample:
        """One of them."""
        ...


@dataclass(frozen=True)
class StepResult:
    """What a step found, over all ranks."""

    metrics: Mapping[str, float]
    num_photos: int


class Stage(ABC, Generic[Sample]):
    """What differs between the stages."""

    number: int
    model: PairVPR
    optimizer: torch.optim.Optimizer
    sampler: Sampler[Sample]

    @abstractmethod
    def collate(self, samples: Sequence[Sample]) -> Any:
        """Samples -> a batch, on the CPU. Called in loader processes."""

    @abstractmethod
    def set_schedule(self, step: int) -> dict[str, float]:
        """Put the learning rate and weight decay of a step (from 0) into the optimizer; returns them for the log."""

    @abstractmethod
    def backward(self, batch: Any, scaler: torch.amp.GradScaler) -> StepResult:
        """Forward and backward pass; gradients are those of the global batch afterwards.

        Raises `NotFiniteError`, on all ranks alike, that names the photos behind a loss that is no number.
        """


class _Samples(Dataset[Any]):
    """A sampler as torch's DataLoader wants it: indices are (epoch, position)."""

    def __init__(self, sampler: Sampler[Any]) -> None:
        self.sampler = sampler

    def __getitem__(self, index: tuple[int, int]) -> Any:
        return self.sampler.sample(*index)


class _Batches:
    """The (epoch, position) of every sample of this rank's batches, from a position of the run to its end."""

    def __init__(self, start: Position, epochs: int, batches_per_epoch: int, batch_size: int, part: range) -> None:
        self.start, self.epochs, self.batches_per_epoch = start, epochs, batches_per_epoch
        self.batch_size, self.part = batch_size, part

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in range(self.start.epoch, self.epochs):
            first = self.start.batch if epoch == self.start.epoch else 0
            for batch in range(first, self.batches_per_epoch):
                yield [(epoch, batch * self.batch_size + i) for i in self.part]


def run(stage: Stage[Any], config: TrainConfig, context: TrainContext) -> None:
    """Train from the last checkpoint, or from the start, to the end."""
    batches_per_epoch = len(stage.sampler) // config.global_batch_size
    scaler = torch.amp.GradScaler(context.device.type, enabled=stage.model.config.precision is Precision.fp16)
    position = _restore(stage, scaler, context)
    log = (
        MetricsLog(context.output, position.step, wandb=config.wandb, settings=context.settings)
        if context.rank == 0
        else None
    )
    batches = iter(_loader(stage, config, context, position, batches_per_epoch))
    last_step = min(config.epochs * batches_per_epoch, config.max_steps or math.inf)
    logged_s, waited_s, num_photos = time.perf_counter(), 0.0, 0
    while position.step < last_step:
        waiting_s = time.perf_counter()
        batch = next(batches)
        waited_s += time.perf_counter() - waiting_s
        row = {"step": position.step + 1, "epoch": position.epoch} | stage.set_schedule(position.step)
        result = _step(stage, batch, scaler, config, row)
        num_photos += result.num_photos
        position = _next(position, batches_per_epoch)
        if position.step % config.log_every_steps == 0 or position.step == last_step:
            elapsed_s = time.perf_counter() - logged_s
            row |= {"images_per_s": num_photos / elapsed_s, "waiting_for_data": waited_s / elapsed_s}
            if log is not None:
                log.add(row | dict(result.metrics) | _gpu_memory(context.device))
                context.say(
                    f"step {position.step:,} of {last_step:,}, loss {result.metrics['loss']:.4f}, "
                    f"{row['images_per_s']:.0f} images/s, waiting for data {row['waiting_for_data']:.0%}"
                )
            logged_s, waited_s, num_photos = time.perf_counter(), 0.0, 0
        _after_step(stage, scaler, config, context, position, log, is_last=position.step == last_step)
    if log is not None:
        log.close()


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
        collate_fn=stage.collate,
        num_workers=config.loader_processes,
        pin_memory=context.device.type == "cuda",
    )


def _step(
    stage: Stage[Any], batch: Any, scaler: torch.amp.GradScaler, config: TrainConfig, row: Mapping[str, Any]
) -> StepResult:
    """One step of the optimizer."""
    stage.optimizer.zero_grad(set_to_none=True)
    try:
        result = stage.backward(batch, scaler)
    except NotFiniteError as error:
        raise NotFiniteError(
            f"the loss of step {row['step']} is not a number (lr {row['lr']:.3g}); photos: {error}; the last "
            "checkpoint is kept. Expected a lower learning rate, train.clip_grad, or model.precision=bf16 or fp32"
        ) from error
    if config.clip_grad is not None:
        scaler.unscale_(stage.optimizer)
        trained = [parameter for parameter in stage.model.parameters() if parameter.grad is not None]
        norm = nn.utils.clip_grad_norm_(trained, config.clip_grad)
        result = StepResult({**result.metrics, "gradient_norm": float(norm)}, result.num_photos)
    scaler.step(stage.optimizer)
    scaler.update()
    return result


def _after_step(
    stage: Stage[Any],
    scaler: torch.amp.GradScaler,
    config: TrainConfig,
    context: TrainContext,
    position: Position,
    log: MetricsLog | None,
    *,
    is_last: bool,
) -> None:
    """Validation at the end of an epoch, and the checkpoints that are due."""
    ends_epoch = position.batch == 0
    every = config.checkpoint_every_steps
    if not (ends_epoch or is_last or (every is not None and position.step % every == 0)):
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
            settings=context.settings,
            model=stage.model.state_dict(),
            optimizer=stage.optimizer.state_dict(),
            scaler=scaler.state_dict(),
        )
        log.publish()
        if ends_epoch and position.epoch % config.keep_every_epochs == 0:
            checkpoints.save(checkpoints.kept_url(context.output, position.epoch), content)
        checkpoints.save(checkpoints.last_url(context.output), content)
    context.wait()


def _restore(stage: Stage[Any], scaler: torch.amp.GradScaler, context: TrainContext) -> Position:
    """Put the last checkpoint's state into stage and scaler, if there is one; how far that is."""
    try:
        found = checkpoints.load(checkpoints.last_url(context.output), stage.number, "output")
    except FileNotFoundError:
        return Position()
    stage.model.load_state_dict(found.model, strict=True)
    stage.optimizer.load_state_dict(dict(found.optimizer))
    if found.scaler:
        scaler.load_state_dict(dict(found.scaler))
    return found.position


def _gpu_memory(device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return {}
    return {"gpu_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30}


def distributed(step: nn.Module, context: TrainContext) -> nn.Module:
    """The step as a rank of several runs it: gradients are averaged over the ranks."""
    if context.world_size == 1:
        return step
    device_ids = [context.device] if context.device.type == "cuda" else None
    return DistributedDataParallel(step, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True)


def name_photos(names: Sequence[str]) -> str:
    """The first few, for a message."""
    more = len(names) - NUM_PHOTOS_NAMED
    return ", ".join(names[:NUM_PHOTOS_NAMED]) + (f" and {more} more" if more > 0 else "")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Without waiting, where the tensor is pinned."""
    return tensor.to(device, non_blocking=True)
