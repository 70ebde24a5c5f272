"""What each stage trains, and the schedules at their edges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pairvpr.config.schema import ModelConfig
from pairvpr.models.pair_vpr import PairVPR
from pairvpr.models.weights import initialise
from pairvpr.training.global_batch import StageOneStep, StageTwoStep
from pairvpr.training.optimizer import (
    cosine,
    freeze_for_stage_one,
    freeze_for_stage_two,
    linear_decay,
    scaled_lr,
    set_rates,
    stage_one_multipliers,
    stage_one_optimizer,
    stage_two_optimizer,
    warmup_cosine,
)
from tests.support.small import small_model_config

RATES = st.floats(1e-8, 1.0)
STEPS = st.integers(1, 10_000)


def _config() -> ModelConfig:
    """Two encoder blocks, the first of them frozen."""
    config = small_model_config()
    return replace(config, encoder=replace(config.encoder, depth=2))


def _model(*, pair_classifier_token: bool) -> PairVPR:
    torch.manual_seed(0)
    model = PairVPR(_config(), pair_classifier_token=pair_classifier_token)
    initialise(model)
    return model.requires_grad_(False)


def _check_trained(model: PairVPR, loss: torch.Tensor, frozen_prefixes: tuple[str, ...]) -> None:
    """Exactly the parameters outside these prefixes get a gradient, and exactly those require one."""
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (not name.startswith(frozen_prefixes)), name
        assert (parameter.grad is not None) == parameter.requires_grad, name


EARLY = tuple(
    f"encoder.model.{name}"
    for name in ("cls_token", "pos_embed", "register_tokens", "mask_token", "patch_embed", "blocks.0.")
)


@pytest.mark.parametrize("train_everything", [False, True])
def test_stage_one_trains_what_it_uses(train_everything: bool) -> None:
    model = _model(pair_classifier_token=False)
    freeze_for_stage_one(model, train_everything=train_everything)
    mask = torch.tensor([[True, True, False, True]])
    losses = StageOneStep(model, norm_pix_loss=True)(torch.randn(1, 3, 28, 28), torch.randn(1, 3, 28, 28), mask)
    never = ("mask_token", "globalizer", "classvprmodule")
    _check_trained(model, losses.mean(), never if train_everything else never + EARLY)


@pytest.mark.parametrize("train_everything", [False, True])
def test_stage_two_trains_what_it_uses(train_everything: bool) -> None:
    model = _model(pair_classifier_token=True)
    freeze_for_stage_two(model, train_everything=train_everything)
    result = StageTwoStep(model)(torch.randn(4, 3, 28, 28), torch.tensor([0, 0, 1, 1]), (4,))
    never = ("mask_token", "encoder.model.mask_token", "prediction_head")
    _check_trained(model, result.local_loss, never if train_everything else never + EARLY)


def test_rates_reach_every_group_times_its_multipliers() -> None:
    model = _model(pair_classifier_token=False)
    freeze_for_stage_one(model)
    optimizer = stage_one_optimizer(model, layerwise_decay=0.5, patch_embed_lr_mult=0.2)
    set_rates(optimizer, lr=8.0, weight_decay=0.25)
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert groups.keys() == {id(parameter) for parameter in trained.values()}
    # Two encoder blocks, one decoder block: the head is layer 4, the last encoder block layer 2.
    rates = {name: (groups[id(p)]["lr"], groups[id(p)]["weight_decay"]) for name, p in trained.items()}
    assert rates["prediction_head.weight"] == (8.0, 0.25)
    assert rates["dec_blocks.0.attn.qkv.weight"] == (4.0, 0.25)
    assert rates["dec_norm.bias"] == (4.0, 0.0)
    assert rates["encoder.model.blocks.1.ls1.gamma"] == (2.0, 0.0)


def test_patch_embedding_learns_slowest() -> None:
    multipliers = stage_one_multipliers(
        _model(pair_classifier_token=False), layerwise_decay=0.5, patch_embed_lr_mult=0.2
    )
    assert multipliers["encoder.model.patch_embed.proj.weight"] == (0.5**4 * 0.2, 1.0)
    assert multipliers["encoder.model.patch_embed.proj.bias"] == (0.5**4 * 0.2, 0.0)
    assert min(factors.lr for factors in multipliers.values()) == 0.5**4 * 0.2


def test_stage_two_is_one_group_that_decays_everything() -> None:
    model = _model(pair_classifier_token=True)
    freeze_for_stage_two(model)
    (group,) = stage_two_optimizer(model).param_groups
    assert len(group["params"]) == sum(parameter.requires_grad for parameter in model.parameters())
    assert (group["lr_multiplier"], group["weight_decay_multiplier"]) == (1.0, 1.0)


def test_multipliers_survive_a_checkpoint() -> None:
    model = _model(pair_classifier_token=False)
    freeze_for_stage_one(model)
    saved = stage_one_optimizer(model, layerwise_decay=0.9, patch_embed_lr_mult=0.2)
    loaded = stage_one_optimizer(model, layerwise_decay=0.9, patch_embed_lr_mult=0.2)
    loaded.load_state_dict(saved.state_dict())
    for optimizer in (saved, loaded):
        set_rates(optimizer, lr=1.0, weight_decay=1.0)
    assert [group["lr"] for group in loaded.param_groups] == [group["lr"] for group in saved.param_groups]


@given(base=RATES, final=RATES, warmup_steps=st.integers(0, 100), more_steps=STEPS)
def test_warmup_cosine_at_its_edges(base: float, final: float, warmup_steps: int, more_steps: int) -> None:
    def at(step: int) -> float:
        return warmup_cosine(
            step, base=base, final=final, warmup_steps=warmup_steps, total_steps=warmup_steps + more_steps
        )

    assert at(warmup_steps) == pytest.approx(base)
    assert at(warmup_steps + more_steps) == at(10**9) == final
    if warmup_steps:
        assert at(0) == 0
    if warmup_steps > 1:
        assert at(warmup_steps - 1) == pytest.approx(base)
    for step in range(0, warmup_steps + more_steps, max(1, more_steps // 10)):
        assert 0 <= at(step) <= max(base, final) * (1 + 1e-12)


def test_a_run_shorter_than_its_warmup_ends_at_the_final_rate() -> None:
    assert warmup_cosine(5, base=1.0, final=0.1, warmup_steps=5, total_steps=3) == 0.1


@given(start=RATES, end=RATES, total_steps=STEPS)
def test_cosine_runs_from_start_to_end(start: float, end: float, total_steps: int) -> None:
    values = [cosine(step, start=start, end=end, total_steps=total_steps) for step in range(min(total_steps, 50) + 1)]
    assert values[0] == pytest.approx(start)
    assert cosine(total_steps, start=start, end=end, total_steps=total_steps) == end
    ordered = sorted(values, reverse=start > end)
    assert values == pytest.approx(ordered)
    assert cosine(total_steps, start=start, end=end, total_steps=2 * total_steps) == pytest.approx((start + end) / 2)


@given(base=RATES, end_factor=st.floats(0, 1), decay_steps=STEPS)
def test_linear_decay_at_its_edges(base: float, end_factor: float, decay_steps: int) -> None:
    def at(step: int) -> float:
        return linear_decay(step, base=base, end_factor=end_factor, decay_steps=decay_steps)

    assert at(0) == base
    assert at(decay_steps) == at(decay_steps + 1) == at(10**9) == pytest.approx(base * end_factor, abs=1e-15)
    assert at(decay_steps // 2) >= at(decay_steps // 2 + 1) * (1 - 1e-12)


def test_linear_decay_is_that_of_torch() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=8e-5)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.2, total_iters=20)
    for step in range(30):
        expected = optimizer.param_groups[0]["lr"]
        assert linear_decay(step, base=8e-5, end_factor=0.2, decay_steps=20) == pytest.approx(expected, rel=1e-9)
        optimizer.step()
        scheduler.step()


def test_base_rate_scales_with_the_root_of_the_batch() -> None:
    assert scaled_lr(3e-4, 1024) == 3e-4
    assert scaled_lr(3e-4, 256) == pytest.approx(1.5e-4)
