"""Losses, gradients, optimiser and the transfer between stages, against the method's original implementation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pairvpr.models.pair_vpr import PairVPR
from pairvpr.models.weights import check_keys, stage_two_start
from pairvpr.training.global_batch import StageOneStep, StageTwoResult
from pairvpr.training.losses import mine_pairs, multi_similarity_loss, patches_of
from pairvpr.training.optimizer import (
    cosine,
    freeze_for_stage_one,
    scaled_lr,
    stage_one_multipliers,
    stage_one_optimizer,
    warmup_cosine,
)
from tests.support.ranks import StageTwoCase, largest_misfit, on_one_process, on_ranks
from tests.support.shared import SHARED, needs_shared, parity_arrays, parity_model_config, weights_of

pytestmark = needs_shared
TOLERANCE = 1e-4
SMALL_NETWORKS = ("registers_mlp", "plain_swiglu")


def _pair_set(first: Tensor | np.ndarray, second: Tensor | np.ndarray) -> set[tuple[int, int]]:
    return set(zip(first.tolist(), second.tolist(), strict=True))


def test_multi_similarity() -> None:
    arrays = parity_arrays("multi_similarity")
    descriptors = torch.from_numpy(arrays["descriptors"]).requires_grad_()
    labels = torch.from_numpy(arrays["labels"])
    pairs = mine_pairs(descriptors, labels)
    assert _pair_set(pairs.anchor_positive, pairs.positive) == _pair_set(arrays["anchor_positive"], arrays["positive"])
    assert _pair_set(pairs.anchor_negative, pairs.negative) == _pair_set(arrays["anchor_negative"], arrays["negative"])
    loss = multi_similarity_loss(descriptors, labels, pairs)
    loss.backward()
    assert descriptors.grad is not None
    assert loss.item() == pytest.approx(float(arrays["loss"]), abs=TOLERANCE)
    assert largest_misfit({"": descriptors.grad}, {"": torch.from_numpy(arrays["grad"])}) < 1


def _stage_two_case(rows_per_rank: tuple[int, ...]) -> StageTwoCase:
    arrays = parity_arrays("stage_two_step")
    return StageTwoCase(
        config=parity_model_config("registers_mlp", stage="two"),
        state=weights_of(arrays, "weights/"),
        rows_per_rank=rows_per_rank,
        images=torch.from_numpy(arrays["images"]),
        labels=torch.from_numpy(arrays["labels"]),
    )


def _check_numbers(result: StageTwoResult) -> None:
    arrays = parity_arrays("stage_two_step")
    for name in ("loss", "loss_global", "loss_pair"):
        assert getattr(result, name).item() == pytest.approx(float(arrays[name]), abs=TOLERANCE)
    assert result.batch_accuracy == arrays["batch_accuracy"]
    for name in ("hard_anchor", "hard_positive", "hard_negative"):
        assert getattr(result.pairs, name).tolist() == arrays[name].tolist()
    pairs = result.pairs
    counts = [len(rows) for rows in (pairs.anchor_positive, pairs.positive, pairs.anchor_negative, pairs.negative)]
    assert counts == arrays["multi_similarity_counts"].tolist()


def _check_logits(positive: Tensor, negative: Tensor) -> None:
    arrays = parity_arrays("stage_two_step")
    np.testing.assert_allclose(positive.numpy(), arrays["logit_positive"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(negative.numpy(), arrays["logit_negative"], rtol=0, atol=TOLERANCE)


def test_stage_two_step_on_one_process() -> None:
    outcome = on_one_process(_stage_two_case((16,)))
    _check_numbers(outcome.result)
    _check_logits(outcome.result.logit_positive, outcome.result.logit_negative)
    assert outcome.result.local_loss == outcome.result.loss
    expected = weights_of(parity_arrays("stage_two_step"), "grad/")
    assert largest_misfit(outcome.gradients, expected) < 1


@pytest.mark.slow
def test_stage_two_step_on_several_ranks(tmp_path: Path) -> None:
    layouts = [(16,), (8, 8), (8, 4, 4), (4, 8, 4), (4, 4, 4, 4)]
    expected = weights_of(parity_arrays("stage_two_step"), "grad/")
    for ranks in on_ranks([_stage_two_case(layout) for layout in layouts], tmp_path):
        for outcome in ranks:
            _check_numbers(outcome.result)
            assert largest_misfit(outcome.gradients, expected) < 1
        _check_logits(
            torch.cat([outcome.result.logit_positive for outcome in ranks]),
            torch.cat([outcome.result.logit_negative for outcome in ranks]),
        )


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("name", SMALL_NETWORKS)
def test_stage_one_loss(name: str, norm_pix_loss: bool) -> None:
    arrays = parity_arrays(name)
    model = PairVPR(parity_model_config(name, stage="one"), pair_classifier_token=False)
    model.load_state_dict(weights_of(arrays, "one/weights/"), strict=True)
    freeze_for_stage_one(model)
    first, second, mask = (torch.from_numpy(arrays[f"one/{key}"]) for key in ("image_1", "image_2", "mask"))
    np.testing.assert_array_equal(patches_of(first, 14).numpy(), arrays["one/target"])

    losses = StageOneStep(model, norm_pix_loss=norm_pix_loss)(first, second, mask)
    assert losses.shape == (len(first),)
    assert losses.mean().item() == pytest.approx(float(arrays[f"one/loss_norm_pix_{norm_pix_loss}"]), abs=TOLERANCE)
    losses.mean().backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert dict(model.named_parameters()).keys() - gradients.keys() == set(arrays["one/params_with_no_grad"].tolist())
    if norm_pix_loss:
        expected = weights_of(arrays, "one/grad/")
        assert largest_misfit({name: gradients[name] for name in expected}, expected) < 1


@pytest.mark.parametrize("name", SMALL_NETWORKS)
def test_transfer(name: str) -> None:
    arrays = parity_arrays(name)
    config = parity_model_config(name, stage="two")
    stage_one_state = weights_of(arrays, "one/weights/")
    state = stage_two_start(stage_one_state, config)
    check_keys(state, PairVPR(config).state_dict(), "transferred")
    for table in ("dec_pos_embed", "dec_pos_embed_cls"):
        np.testing.assert_allclose(state[table].numpy(), arrays[f"transfer/{table}"], rtol=0, atol=1e-6)
    new = {"dec_pos_embed", "dec_pos_embed_cls", "decoder_clstoken"}
    assert all(torch.equal(state[name], stage_one_state[name]) for name in state.keys() - new)


def test_optimiser() -> None:
    expected = json.loads((SHARED / "parity" / "stage_one_optimiser.json").read_text())
    model = PairVPR(parity_model_config("registers_mlp", stage="one"), pair_classifier_token=False)
    freeze_for_stage_one(model)
    settings = {
        "layerwise_decay": expected["layerwise_decay"],
        "patch_embed_lr_mult": expected["patch_embed_lr_mult"],
    }
    multipliers = stage_one_multipliers(model, **settings)
    assert {name: list(factors) for name, factors in multipliers.items()} == {
        name: pytest.approx(factors, rel=1e-12) for name, factors in expected["parameters"].items()
    }
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = set()
    for group in stage_one_optimizer(model, **settings).param_groups:
        for parameter in group["params"]:
            trained.add(names[id(parameter)])
            factors = [group["lr_multiplier"], group["weight_decay_multiplier"]]
            assert factors == pytest.approx(expected["parameters"][names[id(parameter)]], rel=1e-12)
    without_gradient = set(parity_arrays("registers_mlp")["one/params_with_no_grad"].tolist())
    assert trained == expected["parameters"].keys() - without_gradient


def test_schedules() -> None:
    expected = json.loads((SHARED / "parity" / "stage_one_optimiser.json").read_text())
    lr, weight_decay = expected["lr_schedule"], expected["wd_schedule"]
    assert lr["base"] == pytest.approx(scaled_lr(3e-4, 512), rel=1e-12)
    for step in range(201):
        computed = warmup_cosine(
            step,
            base=lr["base"],
            final=lr["final"],
            warmup_steps=lr["warmup_iters"],
            total_steps=lr["total_iters"],
        )
        assert computed == pytest.approx(lr["values"][step], rel=1e-12)
        computed = cosine(
            step, start=weight_decay["base"], end=weight_decay["final"], total_steps=weight_decay["total_iters"]
        )
        assert computed == pytest.approx(weight_decay["values"][step], rel=1e-12)
