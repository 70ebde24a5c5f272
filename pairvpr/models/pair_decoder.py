"""The pair decoder's block: the first sequence attends to itself, then to the second, which never changes.

B pairs, L tokens of the first sequence, M of the second (the memory), D width, H heads, E head width.
"""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor, nn

from pairvpr.models.attention import attention
from pairvpr.models.linear import Linear, rounded
from pairvpr.models.vit import LAYER_NORM_EPS, Mlp, SelfAttention

KeysValues: TypeAlias = tuple[Tensor, Tensor]


class CrossAttention(nn.Module):
    """Multi-head attention from one sequence to another."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.projq = Linear(dim, dim)
        self.projk = Linear(dim, dim)
        self.projv = Linear(dim, dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x (B, L, D), memory (B, M, D) -> (B, L, D)."""
        return self.attend(x, self.keys_values(memory))

    def keys_values(self, memory: Tensor) -> KeysValues:
        """Memory (B, M, D) -> its keys and values, (B, M, H, E) each."""
        memory = rounded(memory)
        key, value = (projection(memory).unflatten(-1, (self.num_heads, -1)) for projection in (self.projk, self.projv))
        return key, value

    def attend(self, x: Tensor, keys_values: KeysValues) -> Tensor:
        """x (B, L, D), keys and values (B, M, H, E) -> (B, L, D)."""
        query = self.projq(x).unflatten(-1, (self.num_heads, -1))
        return self.proj(attention(query, *keys_values).flatten(2))


class DecoderBlock(nn.Module):
    """Self-attention, cross-attention, MLP, each pre-norm with a residual."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = SelfAttention(dim, num_heads)
        self.cross_attn = CrossAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.norm3 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim)
        self.norm_y = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x (B, L, D), memory (B, M, D) -> (B, L, D)."""
        return self.attend_memory(self.attend_itself(x), self.keys_values(memory))

    def attend_itself(self, x: Tensor, *, first_row_only: bool = False) -> Tensor:
        """The self-attention: x (B, L, D) -> (B, L, D), or (B, 1, D) for the first row alone."""
        if first_row_only:
            return x[:, :1] + self.attn.first_row(self.norm1(x))
        return x + self.attn(self.norm1(x))

    def keys_values(self, memory: Tensor) -> KeysValues:
        """Memory (B, M, D) -> the keys and values that this block reads, (B, M, H, E) each."""
        return self.cross_attn.keys_values(self.norm_y(memory))

    def attend_memory(self, x: Tensor, keys_values: KeysValues) -> Tensor:
        """The rest of the block: x (B, L, D), keys and values (B, M, H, E) -> (B, L, D). Rows of x are independent."""
        x = x + self.cross_attn.attend(self.norm2(x), keys_values)
        return x + self.mlp(self.norm3(x))
