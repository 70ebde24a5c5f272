"""Recomputed activations change memory alone; the two halves of pair_logits are the whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pairvpr.config.schema import Precision
from pairvpr.models.pair_vpr import PairVPR
from pairvpr.training.global_batch import StageOneStep, StageTwoStep
from pairvpr.training.optimizer import freeze_for_stage_one, freeze_for_stage_two
from tests.support.small import shaken_model, small_model_config


def _model(precision: Precision, *, pair_classifier_token: bool, recompute: bool) -> PairVPR:
    config = replace(small_model_config(), precision=precision)
    model = PairVPR(config, pair_classifier_token=pair_classifier_token)
    model.load_state_dict(shaken_model().state_dict(), strict=pair_classifier_token)
    model.checkpoint_activations = recompute
    return model


def _gradients(model: PairVPR, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def _images(seed: int) -> Tensor:
    return torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(seed))


def _stage_one(precision: Precision, recompute: bool, *, train_everything: bool) -> dict[str, Tensor]:
    model = _model(precision, pair_classifier_token=False, recompute=recompute)
    freeze_for_stage_one(model, train_everything=train_everything)
    mask = torch.tensor([[True, True, False, True]]).expand(4, -1)
    return _gradients(model, StageOneStep(model, norm_pix_loss=True)(_images(0), _images(1), mask).mean())


def _stage_two(precision: Precision, recompute: bool, *, train_everything: bool) -> dict[str, Tensor]:
    model = _model(precision, pair_classifier_token=True, recompute=recompute)
    freeze_for_stage_two(model, train_everything=train_everything)
    return _gradients(model, StageTwoStep(model)(_images(0), torch.tensor([0, 0, 1, 1]), (4,)).local_loss)


@pytest.mark.parametrize("train_everything", [False, True])
@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
@pytest.mark.parametrize("gradients_of", [_stage_one, _stage_two])
def test_gradients_are_the_same(
    gradients_of: Callable[..., dict[str, Tensor]], precision: Precision, train_everything: bool
) -> None:
    kept = gradients_of(precision, False, train_everything=train_everything)
    recomputed = gradients_of(precision, True, train_everything=train_everything)
    assert kept
    assert kept.keys() == recomputed.keys()
    for name, gradient in kept.items():
        assert torch.equal(gradient, recomputed[name]), name


def test_blocks_run_twice_with_gradients_and_once_without() -> None:
    calls = []
    for recompute in (False, True):
        model = _model(Precision.fp32, pair_classifier_token=True, recompute=recompute)
        for block in (*model.encoder.model.blocks, *model.dec_blocks):
            block.register_forward_pre_hook(lambda *_: calls.append("block"))
        for with_gradients in (False, True):
            calls.clear()
            with torch.set_grad_enabled(with_gradients):
                loss = StageTwoStep(model)(_images(0), torch.tensor([0, 0, 1, 1]), (4,)).local_loss
            if with_gradients:
                loss.backward()
            assert len(calls) == 2 * (1 + (recompute and with_gradients))


@pytest.mark.parametrize("precision", list(Precision))
def test_pair_logits_are_their_two_halves(precision: Precision) -> None:
    model = _model(precision, pair_classifier_token=True, recompute=False)
    with torch.no_grad():
        _, dense = model.describe(_images(0))
        embedded = model.embed(dense)
        assert (
            embedded.dtype
            == {
                Precision.fp32: torch.float32,
                Precision.bf16: torch.bfloat16,
                Precision.fp16: torch.float16,
            }[precision]
        )
        halves = model.pair_logits_of_embedded(embedded[:2], embedded[2:])
        assert torch.equal(halves, model.pair_logits(dense[:2], dense[2:]))
