"""Stage one: place-aware masked image modelling (method, section 4).

B samples on this rank, L patches, S image side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pairvpr.config.train_schema import TrainStageOneConfig
from pairvpr.data.samples import PairSample, PairSampler, num_batches
from pairvpr.data.training_sets.base import TrainingSet
from pairvpr.data.training_sets.read import load_view
from pairvpr.models.pair_vpr import PairVPR, normalise
from pairvpr.models.weights import Weights
from pairvpr.training.context import TrainContext
from pairvpr.training.global_batch import StageOneStep, local_loss_of_samples
from pairvpr.training.loop import NotFiniteError, Stage, StepResult, distributed, name_photos, to_device
from pairvpr.training.optimizer import (
    cosine,
    freeze_for_stage_one,
    scaled_lr,
    set_rates,
    stage_one_optimizer,
    warmup_cosine,
)
from pairvpr.training.start import stage_one_start_weights


@dataclass(frozen=True)
class PairBatch:
    """Samples of one rank: views (B, S, S, 3) uint8, masks (B, L) bool, training sets (B,) int64."""

    first: Tensor
    second: Tensor
    mask: Tensor
    sets: Tensor
    urls: list[str]
    num_redrawn: int
    num_places_skipped: int

    def pin_memory(self) -> PairBatch:
        """The collate function for torch's DataLoader."""
        tensors = {name: getattr(self, name).pin_memory() for name in ("first", "second", "mask")}
        return PairBatch(**{**vars(self), **tensors})


class StageOne(Stage[PairSample]):
    """Stage one: the network without a decoder class token, and all that its step needs."""

    number = 1

    def __init__(
        self, config: TrainStageOneConfig, sets: Sequence[TrainingSet], start: Weights, context: TrainContext
    ) -> None:
        self.config, self.context, self.names = config, context, [training_set.name for training_set in sets]
        model, train = config.model, config.train
        self.model = PairVPR(model, pair_classifier_token=False)
        self.model.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in start.arrays.items()})
        self.model.to(context.device).train()
        self.model.checkpoint_activations = train.activation_checkpointing
        freeze_for_stage_one(self.model, train_everything=train.train_everything)
        self.step = distributed(StageOneStep(self.model, norm_pix_loss=train.norm_pix_loss), context)
        self.optimizer = stage_one_optimizer(
            self.model, layerwise_decay=train.layerwise_decay, patch_embed_lr_mult=train.patch_embed_lr_mult
        )
        self.sampler = PairSampler(
            tuple(sets), load_view, train.seed, model.image_size_px, model.num_patches, train.mask_ratio
        )

    def collate(self, samples: Sequence[PairSample]) -> PairBatch:
        """As in `Stage`."""
        return PairBatch(
            first=torch.from_numpy(np.stack([sample.first for sample in samples])),
            second=torch.from_numpy(np.stack([sample.second for sample in samples])),
            mask=torch.from_numpy(np.stack([sample.mask for sample in samples])),
            sets=torch.tensor([sample.set_index for sample in samples]),
            urls=[f"{sample.urls[0]} with {sample.urls[1]}" for sample in samples],
            num_redrawn=sum(sample.num_redrawn for sample in samples),
            num_places_skipped=sum(sample.num_places_skipped for sample in samples),
        )

    def set_schedule(self, step: int) -> dict[str, float]:
        """Method, section 4: warm-up and cosine for the learning rate, cosine for the weight decay."""
        train = self.config.train
        batches_per_epoch = num_batches(len(self.sampler), train.global_batch_size)
        total_steps = train.epochs * batches_per_epoch
        lr = warmup_cosine(
            step,
            base=scaled_lr(train.lr, train.global_batch_size),
            final=train.min_lr,
            warmup_steps=round(train.warmup_epochs * batches_per_epoch),
            total_steps=total_steps,
        )
        decay = cosine(step, start=train.weight_decay, end=train.weight_decay_end, total_steps=total_steps)
        set_rates(self.optimizer, lr=lr, weight_decay=decay)
        return {"lr": lr, "weight_decay": decay}

    def backward(self, batch: PairBatch, scaler: torch.amp.GradScaler) -> Callable[[], StepResult]:
        """As in `Stage`; in `accumulation_steps` parts, of which the last one exchanges gradients."""
        train, device = self.config.train, self.context.device
        size = -(-len(batch.first) // train.accumulation_steps)
        parts = [slice(first, first + size) for first in range(0, len(batch.first), size)]
        losses = []
        for number, part in enumerate(parts):
            waits = isinstance(self.step, DistributedDataParallel) and number < len(parts) - 1
            with cast(DistributedDataParallel, self.step).no_sync() if waits else nullcontext():
                found = self.step(
                    normalise(to_device(batch.first[part], device)),
                    normalise(to_device(batch.second[part], device)),
                    to_device(batch.mask[part], device),
                )
                local = local_loss_of_samples(
                    found, global_batch_size=train.global_batch_size, num_workers=self.context.world_size
                )
                scaler.scale(local).backward()
            losses.append(found.detach())
        return partial(self._result, batch, torch.cat(losses))

    def _result(self, batch: PairBatch, on_device: Tensor) -> StepResult:
        """The losses of all ranks, in all and by training set."""
        losses = on_device.cpu()
        finite = losses.isfinite()
        sums = torch.zeros(2 * len(self.names) + 3, dtype=torch.float64)
        sums.index_add_(0, batch.sets, losses.double())
        sums.index_add_(0, len(self.names) + batch.sets, torch.ones(len(losses), dtype=torch.float64))
        sums[-3:] = torch.tensor([batch.num_redrawn, batch.num_places_skipped, float((~finite).sum())])
        sums = self.context.sum(sums)
        if sums[-1] > 0:
            own = [url for url, is_finite in zip(batch.urls, finite.tolist(), strict=True) if not is_finite]
            raise NotFiniteError(name_photos([url for urls in self.context.gather(own) for url in urls]))
        by_set, counts = sums[: len(self.names)], sums[len(self.names) : 2 * len(self.names)]
        metrics: dict[str, Any] = {"loss": float(by_set.sum() / counts.sum())}
        metrics |= {
            f"loss_{name}": float(total / count)
            for name, total, count in zip(self.names, by_set, counts, strict=True)
            if count
        }
        broken = {"redrawn_photos": int(sums[-3]), "skipped_places": int(sums[-2])}
        return StepResult(metrics, num_photos=2 * int(counts.sum()), counts=broken)


def make_stage(
    config: TrainStageOneConfig, sets: Sequence[TrainingSet], start: Weights, context: TrainContext
) -> StageOne:
    """The stage for a training job."""
    return StageOne(config, sets, start, context)


def start_weights(config: TrainStageOneConfig) -> Weights:
    """Initial weights: DINOv2's for the encoder, a complete stage-one state dict, or seeded random ones."""
    return stage_one_start_weights(config.model, config.train.start, config.train.seed)
