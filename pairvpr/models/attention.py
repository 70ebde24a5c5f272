"""Scaled dot-product attention: one function, run by the fastest engine on this machine.

B batch, L query tokens, M key tokens, H heads, E head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

TRIAL_TOKENS = 64
TRIAL_STEPS, TRIAL_ERROR = 4, 1e-5
"""An engine on trial may be off by so many steps of its number format, or by this where the steps are finer."""
MANY_WEIGHTS = 100_000
"""`_by_products` is faster from this L x M x H on. Measured on two cores: 1.0 to 1.3 times here, 1.4 to 1.6 above."""


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(E)) value, for every head.

    query (B, L, H, E), key and value (B, M, H, E), one floating dtype -> (B, L, H, E). Uses `_by_products` for large
    bf16 images on some CPUs, xformers in inference on a GPU where it is installed and passes its trial, and torch's own
    attention otherwise. Keys and values may be one image's, expanded.
    """
    if query.device.type == "cpu":
        if _is_by_products(query, key):
            return _by_products(query, key, value)
    elif len(query) > 1 and key.stride(0) == value.stride(0) == 0:
        # One memory for all rows of the batch is one longer query: no engine sees tensors whose rows overlap.
        return attention(query.flatten(0, 1).unsqueeze(0), key[:1], value[:1]).view(query.shape)
    elif (operator := _xformers_for(query)) is not None:
        return operator(query, key, value)
    attended = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return attended.transpose(1, 2)


def engine(query: Tensor, key: Tensor, value: Tensor, *, compiled: bool = False) -> str:
    """The name of what runs `attention` of these; torch chooses by device, dtype, shape and the process's flags.

    A compiled network has torch's alone.
    """
    if not compiled and query.device.type == "cpu" and _is_by_products(query, key):
        return "oneDNN's products"
    if not compiled and query.device.type != "cpu" and _xformers_for(query) is not None:
        import xformers  # pyright: ignore[reportMissingImports]

        return f"xformers {xformers.__version__}"
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    choice = torch._fused_sdp_choice(query, key, value)  # pyright: ignore[reportPrivateImportUsage]
    return f"torch's {SDPBackend(choice).name.lower()}{', compiled' if compiled else ''}"


def _is_by_products(query: Tensor, key: Tensor) -> bool:
    num_weights = query.shape[1] * query.shape[2] * key.shape[1]
    is_large = query.dtype is torch.bfloat16 and num_weights >= MANY_WEIGHTS
    if not is_large or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return _products_are_faster()


def _xformers_for(query: Tensor) -> Callable[..., Tensor] | None:
    """xformers' operator, for inference: its backward is not deterministic, and a compiler can't see into it."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    return _xformers_operator(query.device, query.dtype, query.shape[-1])


@cache
def _xformers_operator(device: torch.device, dtype: torch.dtype, head_width: int) -> Callable[..., Tensor] | None:
    """xformers' operator if it is installed, and right on this device; it is tried once."""
    try:
        from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

        steps = torch.arange(3 * TRIAL_TOKENS * 2 * head_width, device=device, dtype=torch.float32)
        query, key, value = torch.sin(steps * steps).to(dtype).view(3, 1, TRIAL_TOKENS, 2, head_width)
        found = memory_efficient_attention(query, key, value)
    except Exception:  # whatever keeps somebody else's kernels from running here, torch's run
        return None
    query, key, value = (tensor.float().transpose(1, 2) for tensor in (query, key, value))
    exact = torch.softmax(query @ key.transpose(2, 3) / head_width**0.5, -1) @ value
    allowed = max(TRIAL_STEPS * torch.finfo(dtype).eps, TRIAL_ERROR)
    is_right = float((found.float() - exact.transpose(1, 2)).abs().max()) <= allowed
    return memory_efficient_attention if is_right else None


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
