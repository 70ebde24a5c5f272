"""The network against outputs of the method's original implementation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from pairvpr.config.schema import DecoderConfig, EncoderConfig, Ffn, ModelConfig
from pairvpr.models.pair_vpr import PairVPR
from pairvpr.models.weights import check_keys
from tests.support.shared import SHARED, needs_shared, parity_arrays, parity_model_config, weights_of

pytestmark = needs_shared
TOLERANCE = 1e-4
SMALL_NETWORKS = ("registers_mlp", "plain_swiglu")


def _assert_close(computed: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(computed.detach().numpy(), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", SMALL_NETWORKS)
def test_stage_two_outputs(name: str) -> None:
    arrays = parity_arrays(name)
    model = PairVPR(parity_model_config(name, stage="two")).eval()
    model.load_state_dict(weights_of(arrays, "two/weights/"), strict=True)
    with torch.no_grad():
        descriptors, dense = model.describe(torch.from_numpy(arrays["two/images"]))
        query = dense[:1].expand(4, -1, -1)
        query_first, candidate_first = (
            model.pair_logits(query, dense[1:]),
            model.pair_logits(dense[1:], query),
        )
        both = model.score_pairs(query, dense[1:])
    _assert_close(dense, arrays["two/dense"])
    _assert_close(descriptors, arrays["two/descriptors"])
    _assert_close(query_first, arrays["two/score_query_first"])
    _assert_close(candidate_first, arrays["two/score_candidate_first"])
    _assert_close(both, arrays["two/score_query_first"] + arrays["two/score_candidate_first"])


@pytest.mark.parametrize("name", SMALL_NETWORKS)
def test_sixteen_bits_stay_near(name: str) -> None:
    arrays = parity_arrays(name)
    config = parity_model_config(name, stage="two")
    config.precision = type(config.precision).bf16
    model = PairVPR(config).eval()
    model.load_state_dict(weights_of(arrays, "two/weights/"), strict=True)
    with torch.no_grad():
        descriptors, _ = model.describe(torch.from_numpy(arrays["two/images"]))
    assert descriptors.dtype == torch.float32
    difference = np.abs(descriptors.numpy() - arrays["two/descriptors"]).max()
    assert TOLERANCE / 10 < difference < 0.05  # it did run at 16 bits, and well


@pytest.mark.parametrize("name", SMALL_NETWORKS)
def test_stage_one_reconstruction(name: str) -> None:
    arrays = parity_arrays(name)
    model = PairVPR(parity_model_config(name, stage="one"), pair_classifier_token=False)
    model.load_state_dict(weights_of(arrays, "one/weights/"), strict=True)
    prediction = model.reconstruct(
        torch.from_numpy(arrays["one/image_1"]),
        torch.from_numpy(arrays["one/image_2"]),
        torch.from_numpy(arrays["one/mask"]),
    )
    _assert_close(prediction, arrays["one/prediction"])
    prediction.square().mean().backward()
    without_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without_gradient == set(arrays["one/params_with_no_grad"].tolist())


SIZES = {
    "vitb": EncoderConfig(),
    "vitl": EncoderConfig(embed_dim=1024, depth=24, num_heads=16),
    "vitg": EncoderConfig(embed_dim=1536, depth=40, num_heads=24, ffn=Ffn.swiglu),
}
MILLION_PARAMETERS = {"vitb": 201.9, "vitl": 420.0, "vitg": 1252.7}


@pytest.mark.parametrize("stage", ["one", "two"])
@pytest.mark.parametrize("size", list(SIZES))
def test_full_size_keys(size: str, stage: str) -> None:
    shapes = json.loads((SHARED / "parity" / f"state_dict_{size}_stage_{stage}.json").read_text())
    image_size_px = 224 if stage == "one" else 322
    config = ModelConfig(name=size, image_size_px=image_size_px, encoder=SIZES[size], decoder=DecoderConfig())
    with torch.device("meta"):
        model = PairVPR(config, pair_classifier_token=stage == "two")
        published = {name: torch.empty(shape) for name, shape in shapes.items()}
    check_keys(published, model.state_dict(), "published")
    model.load_state_dict(published, strict=True, assign=True)
    if stage == "two":
        count = sum(parameter.numel() for parameter in model.parameters())
        assert round(count / 1e6, 1) == MILLION_PARAMETERS[size]
