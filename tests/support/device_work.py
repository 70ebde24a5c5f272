"""The network's work on any device, small: describing, re-ranking, steps of both stages, validation.

Tests compare its results on a simulated or a real GPU with those on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pairvpr.config.schema import DecoderConfig, EncoderConfig, ModelConfig, Precision
from pairvpr.config.train_schema import StageOneConfig, StageTwoConfig, TrainStageOneConfig, TrainStageTwoConfig
from pairvpr.models.pair_vpr import PairVPR
from pairvpr.models.weights import Weights, build_model, untrained_state
from pairvpr.retrieval.describe import Describer
from pairvpr.retrieval.features import FeatureCache, PhotoFeatures
from pairvpr.retrieval.rerank import Reranked, Reranker, WorkUnit
from pairvpr.training import loop, stage_one, stage_two
from pairvpr.training.context import TrainContext

SIDE_PX, PATCHES, WIDTH, DEPTH = 84, 36, 96, 3
"""Of the network's photos and blocks; its decoder has as many blocks as its encoder."""
PHOTOS = np.random.default_rng(0).integers(0, 256, (12, SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
FEATURE_BYTES = PATCHES * WIDTH * 4
UNITS = (WorkUnit(0, {0: [1, 2, 3, 4, 5, 6], 7: [5, 6, 8, 9, 10, 2]}), WorkUnit(1, {1: [2, 3, 11, 5], 4: [9, 10]}))


def network_config(precision: Precision) -> ModelConfig:
    """Every part of the full network; the encoder's positions are resized."""
    return ModelConfig(
        image_size_px=SIDE_PX,
        precision=precision,
        descriptor_dim=128,
        encoder=EncoderConfig(
            embed_dim=WIDTH, depth=DEPTH, num_heads=3, pretrain_image_size_px=56, num_trainable_blocks=1
        ),
        decoder=DecoderConfig(embed_dim=WIDTH, depth=DEPTH, num_heads=3),
    )


def untrained(config: ModelConfig, *, pair_classifier_token: bool = True) -> Weights:
    """Weights of a seed, moved so that photos and pairs differ."""
    generator = torch.Generator().manual_seed(1)
    state = untrained_state(config, pair_classifier_token=pair_classifier_token)
    tables = ("dec_pos_embed", "dec_pos_embed_cls")
    arrays = {
        name: (tensor if name in tables else tensor + 0.02 * torch.randn(tensor.shape, generator=generator)).numpy()
        for name, tensor in state.items()
    }
    return Weights(arrays, "", untrained=True)


def network(precision: Precision, device: torch.device) -> PairVPR:
    """As inference builds it."""
    config = network_config(precision)
    return build_model(config, untrained(config), device)


def reranker(model: PairVPR, device: torch.device, batch_size: int = 4) -> Reranker:
    """Describes `PHOTOS`; the database's features are kept, a few on the device and a few behind it."""
    describer = Describer(model)
    cache = FeatureCache(3 * FEATURE_BYTES, behind=FeatureCache(6 * FEATURE_BYTES))
    return Reranker(
        model,
        batch_size=batch_size,
        query_features=PhotoFeatures(PHOTOS.__getitem__, describer.embedded, device=device),
        database_features=PhotoFeatures(PHOTOS.__getitem__, describer.embedded, device=device, cache=cache),
    )


def reranked(precision: Precision, device: torch.device) -> list[Reranked]:
    """Both units, twice: the second time from the caches."""
    scorer = reranker(network(precision, device), device)
    return [answer for unit in UNITS * 2 for answer in scorer.rerank(unit)]


@dataclass(frozen=True)
class Recipe:
    """How a stage is trained; each recipe takes other branches of a step."""

    precision: Precision = Precision.fp32
    clip_grad: float | None = None
    activation_checkpointing: bool = False
    accumulation_steps: int = 1
    train_everything: bool = False


RECIPES = (
    Recipe(),
    Recipe(accumulation_steps=2),
    Recipe(Precision.bf16, clip_grad=1.0, activation_checkpointing=True),
    Recipe(Precision.fp16, clip_grad=1.0),
)


class _NamedSet:
    """A training set that is only asked for its name and size: batches are made by hand."""

    name = "sfxl"

    def __len__(self) -> int:
        return 64


class Training:
    """A stage and its batches of random photos, the same on every device."""

    def __init__(self, number: int, recipe: Recipe, device: torch.device) -> None:
        self.device = device
        self.stage, self.config = self._stage_one(recipe) if number == 1 else self._stage_two(recipe)
        for group in self.stage.optimizer.param_groups:
            group["fused"] = True  # as on a GPU: a CPU's optimizer of its own rounds otherwise
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision is Precision.fp16)
        self._random = np.random.default_rng(1)
        self._num_steps = 0

    def _stage_one(self, recipe: Recipe) -> tuple[Any, StageOneConfig]:
        train = StageOneConfig(
            root="unused",
            global_batch_size=4,
            clip_grad=recipe.clip_grad,
            activation_checkpointing=recipe.activation_checkpointing,
            train_everything=recipe.train_everything,
            accumulation_steps=recipe.accumulation_steps,
        )
        config = TrainStageOneConfig(output="unused", model=network_config(recipe.precision), train=train)
        start = untrained(config.model, pair_classifier_token=False)
        sets: Any = [_NamedSet()]
        return stage_one.StageOne(config, sets, start, self._context()), train

    def _stage_two(self, recipe: Recipe) -> tuple[Any, StageTwoConfig]:
        train = StageTwoConfig(
            root="unused",
            global_batch_size=3,
            clip_grad=recipe.clip_grad,
            activation_checkpointing=recipe.activation_checkpointing,
            train_everything=recipe.train_everything,
        )
        config = TrainStageTwoConfig(output="unused", model=network_config(recipe.precision), train=train)
        places: Any = _NamedSet()
        return stage_two.StageTwo(config, places, untrained(config.model), self._context()), train

    def _context(self) -> TrainContext:
        return TrainContext(rank=0, world_size=1, device=self.device, output="unused", settings={})

    def batch(self) -> Any:
        """The next batch, pinned for a GPU as the loader does it."""
        made = self._pairs() if self.stage.number == 1 else self._places()
        return made if self.device.type == "cpu" else made.pin_memory()

    def _pairs(self) -> stage_one.PairBatch:
        masks = np.stack([self._random.permutation(PATCHES) < 32 for _ in range(4)])
        first, second = self._photos(4), self._photos(4)
        return stage_one.PairBatch(
            first, second, torch.from_numpy(masks), torch.zeros(4, dtype=torch.int64), list("abcd"), 0, 0
        )

    def _places(self) -> stage_two.PlaceBatch:
        return stage_two.PlaceBatch(self._photos(12), torch.arange(3).repeat_interleave(4), list("abcdefghijkl"), 0, 0)

    def _photos(self, count: int) -> torch.Tensor:
        return torch.from_numpy(self._random.integers(0, 256, (count, SIDE_PX, SIDE_PX, 3), dtype=np.uint8))

    def step(self, batch: Any) -> dict[str, float]:
        """One step of the optimizer, and what it found."""
        self._num_steps += 1
        row = {"step": self._num_steps} | self.stage.set_schedule(50)
        with loop.deterministic_sums():
            return dict(loop._step(self.stage, batch, self.scaler, self.config, row).metrics)

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """The trained parameters, on the host."""
        return {name: its.detach().cpu().numpy() for name, its in self.stage.model.named_parameters()}


def two_steps(number: int, recipe: Recipe, device: torch.device) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """The metrics of two steps, and the weights behind them."""
    training = Training(number, recipe, device)
    return [training.step(training.batch()) for _ in range(2)], training.weights()
