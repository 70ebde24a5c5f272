"""Scaled dot-product attention: one function, run by the fastest engine on this machine.

B batch, L query tokens, M key tokens, H heads, E head width.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MANY_WEIGHTS = 100_000
"""`_by_products` is faster from this L x M x H on. Measured on two cores: 1.0 to 1.3 times here, 1.4 to 1.6 above."""


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(E)) value, for every head.

    query (B, L, H, E), key and value (B, M, H, E), one floating dtype -> (B, L, H, E). Uses xformers' memory-efficient
    operator where it supports this device, dtype and head width, `_by_products` for large bf16 images on some CPUs, and
    torch's own attention otherwise.
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
    """`attention` as three plain steps for each image of the batch: matrix product, softmax, matrix product.

    Softmax input and output are bf16; the softmax itself runs in fp32. Queries are scaled first, because oneDNN is
    slower when it divides by sqrt(E) itself.
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
    """Whether bf16 products are faster here than torch's attention: on CPUs with AVX512-BF16 but without AMX.

    There oneDNN's bf16 products take half the time of fp32 ones, while torch's bf16 attention gains nothing. With AMX
    torch's attention uses AMX; that has not been measured.
    """
    return (
        torch.backends.mkldnn.is_available()
        and torch.cpu._is_avx512_bf16_supported()
        and not torch.cpu._is_amx_tile_supported()
    )


@cache
def _xformers_operator(device: str, dtype: torch.dtype, head_width: int) -> Any:
    """xformers' operator, or None. xformers also installs without a GPU and then has no kernel, so it is tried once.

    The trial runs forward and backward, even if the first call comes from inference mode.
    """
    try:
        from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

        with torch.inference_mode(False), torch.enable_grad():
            probe = torch.zeros(1, 16, 1, head_width, device=device, dtype=dtype, requires_grad=True)
            memory_efficient_attention(probe, probe, probe).sum().backward()
    except (ImportError, NotImplementedError, ValueError, RuntimeError):
        return None
    return memory_efficient_attention
