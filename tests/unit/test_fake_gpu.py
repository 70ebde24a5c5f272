"""The full-size network on fake CUDA tensors: shapes and devices without values, and CUDA's own autocast lists."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pairvpr.config.schema import ModelConfig, Precision
from pairvpr.models.linear import to_sixteen_bits
from pairvpr.models.pair_scorer import PairScorer
from pairvpr.models.pair_vpr import AUTOCAST_DTYPES, PairVPR, normalise

pytestmark = pytest.mark.slow

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""


@pytest.fixture(scope="module", autouse=True)
def _guard_of_cuda_devices(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A build without CUDA has no guard for its devices; `x[:, None]` of a fake tensor fails without one."""
    if torch.version.cuda is not None:
        return
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("torch was built without CUDA, and there is no g++ to build what fake CUDA tensors need")
    root, folder = Path(torch.__file__).parent, tmp_path_factory.mktemp("guard")
    (folder / "guard.cpp").write_text(GUARD)
    inputs = [f"-I{root}/include", "guard.cpp", "-o", "guard.so", f"-L{root}/lib", "-lc10"]
    subprocess.run([compiler, "-std=c++20", "-shared", "-fPIC", *inputs], cwd=folder, check=True)
    ctypes.CDLL(str(folder / "guard.so"))


EMBEDDINGS_OF_PATCHES = 1
"""The one weight that stays in 32 bits under autocast."""


class _Casts(TorchDispatchMode):
    """Counts casts to 16 bits by the number of dimensions: weights have two, tokens three."""

    def __init__(self) -> None:
        super().__init__()
        self.by_dimensions: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "aten::_to_copy" and args[0].dtype is torch.float32:
            self.by_dimensions[args[0].ndim] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", Precision)
def test_everything_stays_on_the_gpu_and_no_weight_is_cast(precision: Precision) -> None:
    device, dtype = torch.device("cuda", 0), AUTOCAST_DTYPES.get(precision, torch.float32)
    with (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        mock.patch("torch.utils.weakref.getweakrefs", return_value=[]),
        FakeTensorMode(),
        torch.no_grad(),  # inference mode would hide casts inside composite operators
    ):
        with device:
            model = PairVPR(ModelConfig(precision=precision)).eval().requires_grad_(False)
        if precision is not Precision.fp32:
            to_sixteen_bits(model, dtype)
        pixels = torch.empty(2, 322, 322, 3, dtype=torch.uint8, device=device)
        with _Casts() as casts:
            descriptors, dense = model.describe(normalise(pixels))
            embedded, scorer = model.embed(dense), PairScorer(model)
            pair_of = torch.zeros(5, dtype=torch.int64, device=device)
            memory = scorer.as_memory(embedded, keep=False)
            logits = scorer.logits(scorer.as_first(embedded), pair_of, memory, pair_of)
    assert (descriptors.device, embedded.device, logits.device) == (device, device, device)
    assert (descriptors.dtype, embedded.dtype, logits.dtype) == (torch.float32, dtype, torch.float32)
    is_fp32 = precision is Precision.fp32
    assert casts.by_dimensions[2] == (0 if is_fp32 else EMBEDDINGS_OF_PATCHES)
    assert (casts.by_dimensions[3] > 0) == (not is_fp32)
