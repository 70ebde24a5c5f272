"""Stage two: global descriptor and pair classifier together (method, section 5).

P places on this rank, N photos per place, S image side in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pairvpr.config.train_schema import TrainStageTwoConfig
from pairvpr.data.samples import PHOTOS_PER_PLACE, PlaceSample, PlaceSampler, rank_slice
from pairvpr.data.training_sets.gsv_cities import GsvCities
from pairvpr.data.training_sets.read import load_view
from pairvpr.models.pair_vpr import PairVPR, normalise
from pairvpr.models.weights import Weights
from pairvpr.training.context import TrainContext
from pairvpr.training.global_batch import StageTwoResult, StageTwoStep
from pairvpr.training.loop import NotFiniteError, Stage, StepResult, distributed, name_photos, to_device
from pairvpr.training.optimizer import freeze_for_stage_two, linear_decay, set_rates, stage_two_optimizer
from pairvpr.training.start import stage_two_start_weights


@dataclass(frozen=True)
class PlaceBatch:
    """Places of one rank: photos (P * N, S, S, 3) uint8, labels (P * N,) int64, equal within a place."""

    photos: Tensor
    labels: Tensor
    urls: list[str]
    num_redrawn: int
    num_places_skipped: int

    def pin_memory(self) -> PlaceBatch:
        """As torch's DataLoader asks for it."""
        return PlaceBatch(**{**vars(self), "photos": self.photos.pin_memory(), "labels": self.labels.pin_memory()})


class StageTwo(Stage[PlaceSample]):
    """Stage two: the whole network, and all that its step needs."""

    number = 2

    def __init__(self, config: TrainStageTwoConfig, places: GsvCities, start: Weights, context: TrainContext) -> None:
        self.config, self.context = config, context
        model, train = config.model, config.train
        self.model = PairVPR(model)
        self.model.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in start.arrays.items()})
        self.model.to(context.device).train()
        self.model.checkpoint_activations = train.activation_checkpointing
        freeze_for_stage_two(self.model, train_everything=train.train_everything)
        self.step = distributed(
            StageTwoStep(self.model, context.group, pair_loss_weight=train.pair_loss_weight), context
        )
        self.optimizer = stage_two_optimizer(self.model)
        self.sampler = PlaceSampler(places, load_view, train.seed, model.image_size_px, train.num_augment_operations)
        self.rows_per_rank = [
            PHOTOS_PER_PLACE * len(rank_slice(train.global_batch_size, rank, context.world_size))
            for rank in range(context.world_size)
        ]

    def collate(self, samples: Sequence[PlaceSample]) -> PlaceBatch:
        """As in `Stage`."""
        return PlaceBatch(
            photos=torch.from_numpy(np.concatenate([sample.images for sample in samples])),
            labels=torch.from_numpy(np.repeat([sample.label for sample in samples], PHOTOS_PER_PLACE)),
            urls=[url for sample in samples for url in sample.urls],
            num_redrawn=sum(sample.num_redrawn for sample in samples),
            num_places_skipped=sum(sample.num_places_skipped for sample in samples),
        )

    def set_schedule(self, step: int) -> dict[str, float]:
        """Method, section 5: linear decay of the learning rate."""
        train = self.config.train
        lr = linear_decay(step, base=train.lr, end_factor=train.lr_end_factor, decay_steps=train.decay_steps)
        set_rates(self.optimizer, lr=lr, weight_decay=train.weight_decay)
        return {"lr": lr, "weight_decay": train.weight_decay}

    def backward(self, batch: PlaceBatch, scaler: torch.amp.GradScaler) -> Callable[[], StepResult]:
        """As in `Stage`."""
        device = self.context.device
        result: StageTwoResult = self.step(
            normalise(to_device(batch.photos, device)), to_device(batch.labels, device), self.rows_per_rank
        )
        scaler.scale(result.local_loss).backward()
        return partial(self._found, batch, result)

    def _found(self, batch: PlaceBatch, result: StageTwoResult) -> StepResult:
        loss, loss_global, loss_pair = torch.stack([result.loss, result.loss_global, result.loss_pair]).tolist()
        if not math.isfinite(loss):  # the same number on every rank
            raise NotFiniteError(name_photos([url for urls in self.context.gather(batch.urls) for url in urls]))
        counts = self.context.sum(torch.tensor([batch.num_redrawn, batch.num_places_skipped, result.rows_sent]))
        metrics = {
            "loss": loss,
            "loss_global": loss_global,
            "loss_pair": loss_pair,
            "batch_accuracy": result.batch_accuracy,
            "rows_sent": int(counts[2]),
        }
        broken = {"redrawn_photos": int(counts[0]), "skipped_places": int(counts[1])}
        return StepResult(metrics, num_photos=sum(self.rows_per_rank), counts=broken)


def make_stage(
    config: TrainStageTwoConfig, sets: Sequence[GsvCities], start: Weights, context: TrainContext
) -> StageTwo:
    """The stage for a training job."""
    (places,) = sets
    return StageTwo(config, places, start, context)


def start_weights(config: TrainStageTwoConfig) -> Weights:
    """Initial weights: a stage-one checkpoint, a complete stage-two state dict, or seeded random ones."""
    return stage_two_start_weights(config.model, config.train.start, config.train.seed)
