"""From a stage-one state dict to the one that stage two starts from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pairvpr.config.schema import ModelConfig
from pairvpr.errors import UserError
from pairvpr.models.pair_vpr import PairVPR
from pairvpr.models.weights import initialise, stage_two_start
from tests.support.small import small_model_config


def _config(image_size_px: int) -> ModelConfig:
    return replace(small_model_config(), image_size_px=image_size_px)


def _stage_one_state(image_size_px: int = 28) -> dict[str, Tensor]:
    torch.manual_seed(1)
    model = PairVPR(_config(image_size_px), pair_classifier_token=False)
    initialise(model)
    return model.state_dict()


def test_same_grid_is_used_as_stored() -> None:
    stage_one = _stage_one_state()
    state = stage_two_start(stage_one, _config(28))
    assert torch.equal(state["dec_pos_embed"], stage_one["dec_pos_embed"])
    assert torch.equal(state["dec_pos_embed_cls"][1:], stage_one["dec_pos_embed"])
    assert not state["dec_pos_embed_cls"][0].any()


@pytest.mark.parametrize("image_size_px", [14, 28, 56, 70])
def test_fits_stage_two_at_its_own_side(image_size_px: int) -> None:
    stage_one = _stage_one_state()
    state = stage_two_start(stage_one, _config(image_size_px))
    PairVPR(_config(image_size_px)).load_state_dict(state, strict=True)
    assert torch.equal(state["globalizer.0.weight"], stage_one["globalizer.0.weight"])
    token = state["decoder_clstoken"]
    assert 0 < token.abs().max() < 1e-5
    assert torch.equal(token, stage_two_start(stage_one, _config(image_size_px))["decoder_clstoken"])
    assert "decoder_clstoken" not in stage_one


@pytest.mark.parametrize("stage", ["two", "one, without a table", "one, cut short", "one, of another width"])
def test_foreign_weights_are_refused_by_name(stage: str) -> None:
    state = _stage_one_state()
    culprit = "dec_pos_embed"
    if stage == "two":
        state = stage_two_start(state, _config(28))
        culprit = "2 unexpected: dec_pos_embed_cls, decoder_clstoken"
    elif stage == "one, without a table":
        del state["dec_pos_embed"]
    elif stage == "one, cut short":
        state["dec_pos_embed"] = state["dec_pos_embed"][:-1]
    else:
        state[culprit := "dec_norm.bias"] = torch.zeros(31)
    with pytest.raises(UserError, match=culprit) as caught:
        stage_two_start(state, _config(56))
    assert "\n" not in str(caught.value)
