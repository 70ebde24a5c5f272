"""Linear layers, run by the fastest matrix product on this machine.

N rows, C input width, D output width.
"""

from __future__ import annotations

import platform
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

USUAL_ROWS = 4 * 529
"""A few pairs at 322 px. oneDNN's layout for this number of rows also serves other numbers."""


class Linear(nn.Linear):
    """`nn.Linear` whose weights may be kept in 16 bits for inference (`to_sixteen_bits`)."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., C) -> (..., D)."""
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor, *, with_gelu: bool = False) -> Tensor:
    """x weight^T + bias, (..., C) -> (..., D), optionally followed by the exact GELU. `weight` is (D, C).

    On a CPU, and without gradients, oneDNN computes it: torch uses MKL for fp32, which is a fifth slower on an AMD
    processor, and applies GELU in another pass over memory. Under autocast the product is 16-bit, as torch's is.
    Packed weights (`to_sixteen_bits`) do not support autograd. A compiler gets torch's own product.
    """
    is_ours = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if is_ours and (weight.is_mkldnn or not torch.is_grad_enabled()):
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        operator = _onednn_operator(dtype)
        if operator is not None:
            weight = weight if weight.dtype is dtype else plain(weight).to(dtype)
            return operator(x.to(dtype), weight, bias.to(dtype), "gelu" if with_gelu else "none", [], "none")
    product = F.linear(x, weight, bias)
    return F.gelu(product) if with_gelu else product


def rounded(x: Tensor) -> Tensor:
    """x as matrix products read it under autocast: what several of them read is then cast once.

    With gradients x stays as it is, so that those of the products are added up in fp32.
    """
    device = x.device.type
    if torch.is_grad_enabled() or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def to_sixteen_bits(model: nn.Module, dtype: torch.dtype, *, packed: bool = True) -> None:
    """Convert the weights of every `Linear` to this dtype, in place. Autocast would otherwise round them at each call.

    Where oneDNN computes the products, the weights are also `packed` into its layout, which it would otherwise do at
    each call; a compiler can't read them then. A packed network stays on the CPU and can be neither trained nor saved.
    """
    for module in model.modules():
        if isinstance(module, Linear):
            module.to(dtype)
            if packed and module.weight.device.type == "cpu" and _onednn_operator(dtype) is not None:
                laid_out = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), USUAL_ROWS)
                module.weight = nn.Parameter(laid_out, requires_grad=False)


def plain(weight: Tensor) -> Tensor:
    """A `Linear`'s weight (D, C) as a plain tensor, whatever its layout."""
    return weight.to_dense() if weight.is_mkldnn else weight


@cache
def _onednn_operator(dtype: torch.dtype) -> Any:
    """oneDNN's linear layer, or None where torch or this CPU lacks it for the dtype, or runs it slowly."""
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    if dtype is torch.bfloat16 and platform.machine() not in ("x86_64", "AMD64"):
        return None
    try:
        operator = torch.ops.mkldnn._linear_pointwise
        ones = torch.ones(2, 2, dtype=dtype)
        with torch.inference_mode():
            laid_out = torch.ops.mkldnn._reorder_linear_weight(ones, USUAL_ROWS)
            operator(ones, laid_out, ones[0], "gelu", [], "none")
    except (AttributeError, RuntimeError, TypeError):
        return None
    return operator
