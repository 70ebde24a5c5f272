"""The network's work on a device that is not the CPU: the CPU's answers, no mixed devices, few host waits and kernels.

The device is `tests/support/simulated_gpu.py`. Each check is also run with a fault planted, and must notice it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pairvpr.config.schema import Precision
from pairvpr.data.benchmarks import toy_city
from pairvpr.distributed.validate import validate
from pairvpr.models import weights
from pairvpr.models.pair_scorer import PairScorer
from pairvpr.models.pair_vpr import PairVPR
from pairvpr.models.pos_embed import sine_cosine_2d
from pairvpr.retrieval.describe import Describer
from pairvpr.retrieval.rerank import Reranker
from pairvpr.training import loop, stage_one
from pairvpr.training.context import TrainContext
from pairvpr.training.optimizer import fused_alike, stage_two_optimizer
from tests.support.device_work import (
    DEPTH,
    PATCHES,
    PHOTOS,
    RECIPES,
    SIDE_PX,
    UNITS,
    WIDTH,
    Recipe,
    Training,
    network,
    reranked,
    reranker,
    two_steps,
)
from tests.support.simulated_gpu import CUDA, Record, simulated_gpu
from tests.support.small import SMALL_CITY

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
WAITS_OF_A_BATCH = 1
WAITS_OF_A_PHOTO = 0
WAITS_OF_A_UNIT = 1
"""However many forward passes: results stay on the device until the last pass is queued."""
WAITS_OF_A_STEP = {1: 1, 2: 4}
"""Stage one: its losses. Stage two: descriptors and labels to mine, one in the library's loss, its losses."""
WAITS_OF_CLIPPING = 1
"""For the gradient norm in the log."""
SIXTEEN_BITS_MOVE_A_SCORE = 0.05


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    """Sums are then added in one order, whatever ran before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check_description(precision: Precision) -> None:
    """Descriptors are the CPU's; a batch and a photo wait as often as they may."""
    expected = Describer(network(precision, CPU)).descriptors(PHOTOS[:4])
    with simulated_gpu() as record:
        describer = Describer(network(precision, CUDA))
        record.forget()
        found = describer.descriptors(PHOTOS[:4])
        assert record.waits_in() <= WAITS_OF_A_BATCH, record.waits
        record.forget()
        describer.embedded(PHOTOS[0])
        assert record.waits_in() <= WAITS_OF_A_PHOTO, record.waits
    np.testing.assert_allclose(found, expected, atol=1e-5 if precision is Precision.fp32 else 3e-3)


def check_reranking(precision: Precision) -> None:
    """Scores are the CPU's, from either cache; a unit waits once, and nothing beside it but descriptions waits."""
    expected = reranked(precision, CPU)
    with simulated_gpu() as record:
        scorer = reranker(network(precision, CUDA), CUDA)
        record.forget()
        found = [answer for unit in UNITS * 2 for answer in scorer.rerank(unit)]
        assert record.waits_in("retrieval/rerank.py", "models/pair_scorer.py") <= WAITS_OF_A_UNIT * 2 * len(UNITS)
        assert record.waits_in("retrieval/features.py") == 0
    tolerance = 1e-5 if precision is Precision.fp32 else SIXTEEN_BITS_MOVE_A_SCORE
    for one, other in zip(found, expected, strict=True):
        assert one.query_id == other.query_id
        scores = dict(zip(one.ids.tolist(), one.pair_scores.tolist(), strict=True))
        assert [scores[image_id] for image_id in other.ids.tolist()] == pytest.approx(
            other.pair_scores.tolist(), abs=tolerance
        )


def check_kernels_of_a_pass(precision: Precision) -> None:
    """Kernels of both directions of one query with its candidates, all reuse, counted from the depth of the decoder."""
    with simulated_gpu() as record, torch.inference_mode():
        run = scoring_pass(network(precision, CUDA), num_candidates=5)
        record.forget()
        run()
    kernels, products = record.kernels, 14 * DEPTH + 4  # the classifier's two layers in each direction
    assert record.waits_in() == 0, record.waits
    assert kernels["linear"] == products
    assert kernels["scaled_dot_product_attention"] == 4 * DEPTH - 1
    assert kernels["native_layer_norm"] == 7 * DEPTH + 1
    allowed_casts = 0 if precision is Precision.fp32 else CASTS_OF_A_PASS
    assert kernels["_to_copy"] <= allowed_casts, f"_to_copy: {kernels['_to_copy']} casts, of weights perhaps"
    assert kernels["index"] == 0, "each candidate is in its place"
    assert not any(is_expanded(tensor) for its in record.attended for tensor in its)
    assert sum(kernels.values()) <= 16 * products // 5, kernels


CASTS_OF_A_PASS = 7 * DEPTH + 2


def is_expanded(tensor: Tensor) -> bool:
    """Whether rows of a batch are one memory: not every attention engine reads that."""
    return len(tensor) > 1 and tensor.stride(0) == 0


def scoring_pass(model: PairVPR, num_candidates: int) -> Callable[[], Tensor]:
    """As `Reranker` makes it: the query's parts kept, the candidates' made."""
    scorer, generator = PairScorer(model), torch.Generator().manual_seed(0)
    images = torch.randn(1 + num_candidates, PATCHES, WIDTH, generator=generator).to(CUDA)
    dense, candidates = model.embed(images[:1]), model.embed(images[1:])
    first, memory = scorer.as_first(dense), scorer.as_memory(dense, keep=True)
    query_of = torch.zeros(num_candidates, dtype=torch.int64, device=CUDA)

    def run() -> Tensor:
        forth = scorer.logits(first, query_of, scorer.as_memory(candidates, keep=False), None)
        return forth + scorer.logits(scorer.as_first(candidates), None, memory, query_of)

    return run


def check_steps(number: int, recipe: Recipe) -> None:
    """Two steps find what they find on the CPU, to the last bit, and leave the same weights."""
    expected, expected_weights = two_steps(number, recipe, CPU)
    with simulated_gpu():
        found, found_weights = two_steps(number, recipe, CUDA)
    assert found == expected
    for name, values in expected_weights.items():
        np.testing.assert_array_equal(found_weights[name], values, err_msg=name)


def step_on_the_gpu(number: int, recipe: Recipe) -> Record:
    """What one step asks of the device, behind one that warms up."""
    with simulated_gpu() as record:
        training = Training(number, recipe, CUDA)
        training.step(training.batch())
        batch = training.batch()
        record.forget()
        training.step(batch)
        return Record(record.waits.copy(), record.kernels.copy())


def check_waits_of_a_step(number: int, recipe: Recipe) -> None:
    """No more than are known."""
    allowed = WAITS_OF_A_STEP[number]
    allowed += WAITS_OF_CLIPPING if recipe.clip_grad is not None else 0
    record = step_on_the_gpu(number, recipe)
    assert record.waits_in() <= allowed, record.waits


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("check", [check_description, check_reranking, check_kernels_of_a_pass])
def test_inference(check: Callable[[Precision], None], precision: Precision) -> None:
    check(precision)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("check", [check_steps, check_waits_of_a_step])
def test_training(check: Callable[[int, Recipe], None], number: int, recipe: Recipe) -> None:
    check(number, recipe)


UNORDERED_ON_A_GPU = {
    *("_upsample_bicubic2d_aa_backward", "upsample_bicubic2d_backward", "col2im", "index_add_", "scatter_add_"),
    *("histc", "put_", "kthvalue", "median", "nll_loss2d_forward", "grid_sampler_2d_backward", "embedding_bag"),
    *("scatter_reduce", "max_unpool2d", "adaptive_avg_pool2d_backward", "cumsum", "bincount"),
}
"""Operators that `use_deterministic_algorithms` makes errors on a GPU, by torch's documentation; their aten names."""


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("train_everything", [False, True])
def test_no_sum_of_a_step_is_unordered_on_a_gpu(number: int, train_everything: bool) -> None:
    kernels = step_on_the_gpu(number, Recipe(train_everything=train_everything)).kernels
    assert not kernels.keys() & UNORDERED_ON_A_GPU
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"]
    with loop.deterministic_sums():
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()


def test_a_checkpoint_goes_from_one_kind_of_device_to_the_other() -> None:
    on_cpu = stage_two_optimizer(network(Precision.fp32, CPU).requires_grad_())
    with simulated_gpu():
        on_gpu = stage_two_optimizer(network(Precision.fp32, CUDA).requires_grad_())
        saved = on_gpu.state_dict()
        on_gpu.load_state_dict(fused_alike(on_cpu.state_dict(), on_gpu))
    on_cpu.load_state_dict(fused_alike(saved, on_cpu))
    assert [group["fused"] for group in on_gpu.param_groups] == [True]
    assert [group["fused"] for group in on_cpu.param_groups] == [None]


@pytest.mark.parametrize(("number", "sequences"), [(1, 2), (2, 1)])
def test_kernels_of_a_training_step(number: int, sequences: int) -> None:
    """Encoder and decoder attention forward; those that are trained backward, too. Products in the same way."""
    kernels = step_on_the_gpu(number, RECIPES[0]).kernels
    attention = {name: count for name, count in kernels.items() if "scaled_dot_product" in name}
    backward = sum(count for name, count in attention.items() if "backward" in name)
    assert sum(attention.values()) - backward == sequences * DEPTH + 2 * DEPTH
    assert backward == sequences * 1 + 2 * DEPTH  # one block of the encoder is trained
    assert sum(kernels.values()) <= KERNELS_OF_A_STEP[number] * 1.2, kernels


KERNELS_OF_A_STEP = {1: 410, 2: 407}


def test_validation(tmp_path: Path) -> None:
    benchmark = toy_city.load(SMALL_CITY, str(tmp_path))

    def recalls(device: torch.device) -> dict[str, float]:
        context = TrainContext(rank=0, world_size=1, device=device, output="unused", settings={})
        return validate(network(Precision.fp32, device), benchmark, 4, context)

    expected = recalls(CPU)
    with simulated_gpu():
        assert recalls(CUDA) == expected


def test_tensors_of_two_devices_do_not_meet() -> None:
    with simulated_gpu() as record:
        ours, host = torch.ones(3, device=CUDA), torch.ones(3)
        with pytest.raises(RuntimeError, match="same device"):
            torch.add(ours, host)
        with pytest.raises(TypeError, match="numpy"):
            ours.numpy()
        assert torch.equal((ours + 1).cpu(), host + 1)
        assert record.waits_in() == 1
        record.forget()
        host.pin_memory().to(CUDA, non_blocking=True)
        assert record.waits_in() == 0
        host.to(CUDA, non_blocking=True)
        host.pin_memory().to(CUDA)
        torch.tensor([1.0], device=CUDA)
        assert record.waits_in() == 3


def _table_that_is_no_buffer(patch: pytest.MonkeyPatch) -> None:
    table = sine_cosine_2d(WIDTH, SIDE_PX // 14)
    patch.setattr(PairVPR, "second_sequence", lambda self, embedded: embedded + table)


def _targets_left_on_the_cpu(patch: pytest.MonkeyPatch) -> None:
    to_device = stage_one.to_device
    patch.setattr(stage_one, "to_device", lambda t, device: t if t.dtype is torch.bool else to_device(t, device))


def _numpy_of_a_device_tensor(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Tensor, "cpu", lambda self: self)
    patch.setattr("tests.support.simulated_gpu.OnGpu.cpu", lambda self: self)


def _wait_in_each_pass(patch: pytest.MonkeyPatch) -> None:
    logits = Reranker._logits

    def waiting(self: Reranker, *args: Any) -> Tensor:
        found = logits(self, *args)
        assert float(found.abs().sum()) >= 0
        return found

    patch.setattr(Reranker, "_logits", waiting)


def _weights_cast_at_each_call(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weights, "to_sixteen_bits", lambda *_, **__: None)


@pytest.mark.parametrize(
    ("plant", "check", "noticed"),
    [
        (_table_that_is_no_buffer, partial(check_reranking, Precision.fp32), "same device"),
        (_targets_left_on_the_cpu, partial(check_steps, 1, RECIPES[0]), "same device"),
        (_numpy_of_a_device_tensor, partial(check_description, Precision.fp32), "to numpy"),
        (_wait_in_each_pass, partial(check_reranking, Precision.fp32), "waits_in"),
        (_weights_cast_at_each_call, partial(check_kernels_of_a_pass, Precision.bf16), "_to_copy"),
    ],
)
def test_a_planted_fault_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
    plant: Callable[[pytest.MonkeyPatch], None],
    check: Callable[[], None],
    noticed: str,
) -> None:
    check()
    plant(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, TypeError), match=noticed):
        check()
