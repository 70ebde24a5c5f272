"""Scaled dot-product attention: one function, two engines.

B batch, L query tokens, M key tokens, H heads, E head width.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(E)) value, for every head.

    query (B, L, H, E), key and value (B, M, H, E), one floating type -> (B, L, H, E). xformers' memory-efficient
    operator runs where it has one for this device, type and head width; torch's own attention elsewhere.
    """
    if query.device.type != "cpu":
        operator = _xformers_operator(query.device.type, query.dtype, query.shape[-1])
        if operator is not None:
            return operator(query, key, value)
    attended = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return attended.transpose(1, 2)


@cache
def _xformers_operator(device: str, dtype: torch.dtype, head_width: int) -> Any:
    """xformers' operator, or None. xformers installs without a GPU and then has none, so it is tried, once.

    It is tried forwards and backwards, also when the first call comes from inference mode, which has no gradients.
    """
    try:
        from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

        with torch.inference_mode(False), torch.enable_grad():
            probe = torch.zeros(1, 16, 1, head_width, device=device, dtype=dtype, requires_grad=True)
            memory_efficient_attention(probe, probe, probe).sum().backward()
    except (ImportError, NotImplementedError, ValueError, RuntimeError):
        return None
    return memory_efficient_attention
