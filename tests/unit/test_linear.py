"""Linear layers against their formula, however their weights are kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pairvpr.models.linear import Linear, linear, plain, to_sixteen_bits

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 70), st.integers(1, 70))


def layer_and_rows(num_rows: int, width: int, out_width: int, seed: int) -> tuple[Linear, torch.Tensor]:
    torch.manual_seed(seed)
    return Linear(width, out_width).requires_grad_(False), torch.randn(1, num_rows, width)


@given(SIZES, st.integers(0, 2**32 - 1), st.booleans())
def test_fp32_is_the_product_and_its_gelu(sizes: tuple[int, int, int], seed: int, with_gelu: bool) -> None:
    layer, x = layer_and_rows(*sizes, seed)
    expected = x.double() @ layer.weight.double().T + layer.bias.double()
    expected = F.gelu(expected) if with_gelu else expected
    for grad_enabled in (False, True):
        with torch.set_grad_enabled(grad_enabled):
            found = linear(x, layer.weight, layer.bias, with_gelu=with_gelu)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(SIZES, st.integers(0, 2**32 - 1), st.booleans())
def test_weights_kept_in_16_bits_are_the_rounded_ones(
    dtype: torch.dtype, sizes: tuple[int, int, int], seed: int, with_gelu: bool
) -> None:
    layer, x = layer_and_rows(*sizes, seed)
    rounded_weight, rounded_bias = layer.weight.to(dtype), layer.bias.to(dtype)
    to_sixteen_bits(nn.ModuleDict({"layer": layer}), dtype)
    assert torch.equal(plain(layer.weight), rounded_weight)
    assert torch.equal(layer.bias, rounded_bias)
    expected = x.to(dtype).double() @ rounded_weight.double().T + rounded_bias.double()
    expected = F.gelu(expected) if with_gelu else expected
    largest_rounding = torch.finfo(dtype).eps * (1 + float(expected.abs().max()))
    for grad_enabled in (False, True):
        with torch.set_grad_enabled(grad_enabled), torch.autocast("cpu", dtype):
            found = linear(x, layer.weight, layer.bias, with_gelu=with_gelu)
        assert found.dtype == dtype
        np.testing.assert_allclose(found.double(), expected, rtol=0, atol=largest_rounding)
    with torch.inference_mode():
        in_32_bits = linear(x, layer.weight, layer.bias, with_gelu=with_gelu)
    expected = x.double() @ rounded_weight.double().T + rounded_bias.double()
    np.testing.assert_allclose(in_32_bits, F.gelu(expected) if with_gelu else expected, rtol=0, atol=1e-5)
