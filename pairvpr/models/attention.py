"""Scaled dot-product attention: one function, by the fastest engine that the machine has.

B batch, L query tokens, M key tokens, H heads, E head width.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MANY_WEIGHTS = 100_000
"""L x M x H from which on `_by_products` gains, measured on two cores: 1.0 to 1.3 times there, 1.4 to 1.6 above."""


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(E)) value, for every head.

    query (B, L, H, E), key and value (B, M, H, E), one floating type -> (B, L, H, E). xformers' memory-efficient
    operator runs where it has one for this device, type and head width; torch's own attention elsewhere, but for bf16
    on some CPUs and large images (`_by_products`).
    """
    if query.device.type == "cpu":
        num_weights = query.shape[1] * query.shape[2] * key.shape[1]
        is_large = query.dtype is torch.bfloat16 and num_weights >= MANY_WEIGHTS
        if is_large and not torch.is_grad_enabled() and _products_are_faster():
            return _by_products(query, key, value)
    else:
        operator = _xformers_operator(query.device.type, query.dtype, query.shape[-1])
        if operator is not None:
            return operator(query, key, value)
    attended = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return attended.transpose(1, 2)


def _by_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`attention`, by three plain steps for each of the batch: products, softmax, products.

    What the softmax is taken of is rounded to 16 bits, about as much as queries and keys were before, and what it gives
    is, too; in between it is computed in 32. (oneDNN could divide by sqrt(E), but takes longer then.)
    """
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    attended = query.new_empty(query.shape)
    query = torch.mul(query, query.shape[-1] ** -0.5, out=query.new_empty(query.shape))
    key, value = key.contiguous(), value.contiguous()
    weights = query.new_empty(*query.shape[1:3], key.shape[2])
    for one_query, one_key, one_value, out in zip(query, key, value, attended, strict=True):
        torch.bmm(one_query, one_key.transpose(1, 2), out=weights)
        torch.softmax(weights, -1, out=weights)
        torch.bmm(weights, one_value, out=out)
    return attended.transpose(1, 2)


@cache
def _products_are_faster() -> bool:
    """With AVX512-BF16 oneDNN's products in bf16 take half the time of those in fp32, torch's attention takes the same.

    With AMX torch's attention uses that; it has not been measured here.
    """
    return (
        torch.backends.mkldnn.is_available()
        and torch.cpu._is_avx512_bf16_supported()
        and not torch.cpu._is_amx_tile_supported()
    )


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
