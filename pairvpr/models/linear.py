"""Linear layers, by the fastest product that the machine has.

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
"""Some pairs at 322 px. oneDNN's layout for so many rows serves other numbers, too."""


class Linear(nn.Linear):
    """`nn.Linear`, whose weights may be kept in 16 bits for inference (`to_sixteen_bits`)."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., C) -> (..., D)."""
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor, *, with_gelu: bool = False) -> Tensor:
    """x weight^T + bias, (..., C) -> (..., D), and the exact GELU of that, if wanted. `weight` is (D, C).

    On a CPU, where no gradient is asked for, oneDNN makes it: torch leaves fp32 to MKL, which takes a fifth longer on
    an AMD processor, and GELU to another pass over memory. Under autocast it is a product of 16 bits, as torch's is.
    Weights that `to_sixteen_bits` has laid out know no gradients.
    """
    if x.device.type == "cpu" and (weight.is_mkldnn or not torch.is_grad_enabled()):
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        operator = _onednn_operator(dtype)
        if operator is not None:
            weight = weight if weight.dtype is dtype else plain(weight).to(dtype)
            return operator(x.to(dtype), weight, bias.to(dtype), "gelu" if with_gelu else "none", [], "none")
    product = F.linear(x, weight, bias)
    return F.gelu(product) if with_gelu else product


def to_sixteen_bits(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights of every `Linear` in this type, as autocast would round them at each call. In place.

    On a CPU where oneDNN makes the products they are laid out as it reads them, too, which it would do at each call:
    such a network stays on the CPU, and is neither trained nor saved.
    """
    for module in model.modules():
        if isinstance(module, Linear):
            module.to(dtype)
            if module.weight.device.type == "cpu" and _onednn_operator(dtype) is not None:
                laid_out = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), USUAL_ROWS)
                module.weight = nn.Parameter(laid_out, requires_grad=False)


def plain(weight: Tensor) -> Tensor:
    """A `Linear`'s weight (D, C), however it is laid out, as a tensor whose rows can be taken."""
    return weight.to_dense() if weight.is_mkldnn else weight


@cache
def _onednn_operator(dtype: torch.dtype) -> Any:
    """oneDNN's linear layer, or None where this build of torch or this machine has none for the type, or a slow one."""
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
