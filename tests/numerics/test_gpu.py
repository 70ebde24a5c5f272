"""The original implementation's numbers and the CPU's answers on a GPU: everywhere a simulated one, and a real one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeAlias

import numpy as np
import pytest
import torch

from pairvpr.config.schema import Precision
from pairvpr.models.pair_vpr import PairVPR
from tests.support.device_work import RECIPES, UNITS, Recipe, network, reranked, reranker, two_steps
from tests.support.shared import needs_shared, parity_arrays, parity_model_config, weights_of
from tests.support.simulated_gpu import CUDA, simulated_gpu

pytestmark = pytest.mark.slow

TOLERANCE = {Precision.fp32: 1e-3, Precision.bf16: 0.1, Precision.fp16: 0.02}
"""Of pair scores."""
PARITY_TOLERANCE = 1e-3
CPU = torch.device("cpu")


@contextmanager
def real_gpu() -> Iterator[None]:
    """The machine's."""
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU on this machine")
    yield


on_each_gpu = pytest.mark.parametrize("gpu", [simulated_gpu, pytest.param(real_gpu, marks=pytest.mark.gpu)])
Gpu: TypeAlias = Callable[[], AbstractContextManager[object]]


@needs_shared
@on_each_gpu
@pytest.mark.parametrize("name", ["registers_mlp", "plain_swiglu"])
def test_parity(gpu: Gpu, name: str) -> None:
    arrays = parity_arrays(name)
    model = PairVPR(parity_model_config(name, stage="two")).eval()
    model.load_state_dict(weights_of(arrays, "two/weights/"), strict=True)
    with gpu(), torch.no_grad():
        model.to(CUDA)
        descriptors, dense = model.describe(torch.from_numpy(arrays["two/images"]).to(CUDA))
        scores = model.score_pairs(dense[:1].expand(4, -1, -1), dense[1:])
        descriptors, scores = descriptors.cpu().numpy(), scores.cpu().numpy()
    expected = arrays["two/score_query_first"] + arrays["two/score_candidate_first"]
    np.testing.assert_allclose(descriptors, arrays["two/descriptors"], rtol=0, atol=PARITY_TOLERANCE)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=PARITY_TOLERANCE)


@on_each_gpu
@pytest.mark.parametrize("precision", Precision)
def test_reranking(gpu: Gpu, precision: Precision) -> None:
    """The CPU's scores; the same bits again, from the caches."""
    expected = reranked(precision, CPU)
    with gpu():
        found = reranked(precision, CUDA)
    for one, other in zip(found, expected, strict=True):
        scores = dict(zip(one.ids.tolist(), one.pair_scores.tolist(), strict=True))
        assert [scores[image_id] for image_id in other.ids.tolist()] == pytest.approx(
            other.pair_scores.tolist(), abs=TOLERANCE[precision]
        )
    half = len(found) // 2
    for first, again in zip(found[:half], found[half:], strict=True):
        np.testing.assert_array_equal(first.pair_scores, again.pair_scores)


@on_each_gpu
@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
def test_features_of_a_photo_depend_on_no_other(gpu: Gpu, precision: Precision) -> None:
    with gpu():
        model = network(precision, CUDA)
        after_another, alone = reranker(model, CUDA), reranker(model, CUDA)
        after_another.rerank(UNITS[0])
        pairs = list(zip(after_another.rerank(UNITS[1]), alone.rerank(UNITS[1]), strict=True))
    for first, second in pairs:
        np.testing.assert_array_equal(first.pair_scores, second.pair_scores)


@on_each_gpu
@pytest.mark.parametrize("recipe", RECIPES[:3], ids=str)
@pytest.mark.parametrize("number", [1, 2])
def test_training_steps(gpu: Gpu, number: int, recipe: Recipe) -> None:
    """The CPU's losses; equal steps leave equal weights, to the last bit."""
    expected, _ = two_steps(number, recipe, CPU)
    with gpu():
        found, weights = two_steps(number, recipe, CUDA)
        again, weights_again = two_steps(number, recipe, CUDA)
    tolerance = 1e-3 if recipe.precision is Precision.fp32 else 0.05
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=tolerance)
    assert again == found
    for name, values in weights.items():
        np.testing.assert_array_equal(weights_again[name], values, err_msg=name)
