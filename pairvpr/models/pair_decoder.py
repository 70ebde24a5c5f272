"""The pair decoder's block: the first sequence looks at itself, then at the second, which never changes.

B pairs, L tokens of the first sequence, M of the second (the memory), D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from pairvpr.models.attention import attention
from pairvpr.models.vit import LAYER_NORM_EPS, Mlp, SelfAttention


class CrossAttention(nn.Module):
    """Multi-head attention from one sequence to another."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.projq = nn.Linear(dim, dim)
        self.projk = nn.Linear(dim, dim)
        self.projv = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x (B, L, D), memory (B, M, D) -> (B, L, D)."""
        query, key, value = (
            projection(tokens).unflatten(-1, (self.num_heads, -1))
            for projection, tokens in ((self.projq, x), (self.projk, memory), (self.projv, memory))
        )
        return self.proj(attention(query, key, value).flatten(2))


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
        x = x + self.attn(self.norm1(x))
        x = x + self.cross_attn(self.norm2(x), self.norm_y(memory))
        return x + self.mlp(self.norm3(x))
