"""Where the pair decoder's class token looks in both photos of a pair.

L patches (a square grid of S x S), D decoder width.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pairvpr.models.pair_decoder import DecoderBlock
from pairvpr.models.pair_vpr import PairVPR


def attention_grids(model: PairVPR, first: Tensor, second: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """`embed`'s output of a pair, (1, L, D) each -> the class token's attention over each photo, (S, S).

    Each sums to 1. The mean over both directions in which a pair is scored.
    """
    first, second = first.float(), second.float()
    over_first, over_second = class_attention(model, first, second)
    over_second_too, over_first_too = class_attention(model, second, first)
    return _grid(over_first + over_first_too), _grid(over_second + over_second_too)


def _grid(twice: Tensor) -> NDArray[np.float32]:
    side = round(len(twice) ** 0.5)
    return (twice / 2).reshape(side, side).cpu().numpy()


def class_attention(model: PairVPR, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """`embed`'s output of a pair, (1, L, D) each -> the class token's attention over the patches of both, (L,) each.

    Softmax weights of the class token's row, mean over blocks and heads: of self-attention over the first photo (the
    token's weight on itself left out, the rest scaled to 1), of cross-attention over the second.
    """
    x, memory = model.first_sequence(first), model.second_sequence(second)
    over_first, over_second = [], []
    for block in cast("list[DecoderBlock]", list(model.dec_blocks)):
        query, key, _ = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1)).unbind(2)
        over_first.append(_weights(query[:, :1], key)[1:])
        x = block.attend_itself(x)
        keys_values = block.keys_values(memory)
        query = block.cross_attn.projq(block.norm2(x[:, :1])).unflatten(-1, (block.cross_attn.num_heads, -1))
        over_second.append(_weights(query, keys_values[0]))
        x = block.attend_memory(x, keys_values)
    own = torch.stack(over_first).mean(0)
    return own / own.sum(), torch.stack(over_second).mean(0)


def _weights(query: Tensor, key: Tensor) -> Tensor:
    """One query token (1, 1, H, E) and keys (1, M, H, E) -> the softmax weights (M,), mean over heads."""
    products = torch.einsum("qhe,mhe->hm", query[0].float(), key[0].float()) / query.shape[-1] ** 0.5
    return products.softmax(-1).mean(0)
