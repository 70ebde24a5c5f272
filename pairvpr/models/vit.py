"""The encoder: a DINOv2 ViT, with or without registers. Parameter names are those of the published weights.

B batch, L patches, C width, P patch side in pixels, R registers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pairvpr.config.schema import EncoderConfig, Ffn
from pairvpr.models.attention import attention
from pairvpr.models.linear import Linear, linear, plain
from pairvpr.models.pos_embed import resize_encoder_table

LAYER_NORM_EPS = 1e-6


class SelfAttention(nn.Module):
    """Multi-head self-attention with a fused projection."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return self.proj(attention(query, key, value).flatten(2))

    def first_row(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, 1, C): the first row of `forward`: the first token, which attends to all."""
        dim = x.shape[-1]
        weight, bias = plain(self.qkv.weight), self.qkv.bias
        query = linear(x[:, :1], weight[:dim], bias[:dim])
        keys_values = linear(x, weight[dim:], bias[dim:])
        key, value = keys_values.unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return self.proj(attention(query.unflatten(-1, (self.num_heads, -1)), key, value).flatten(2))


class Mlp(nn.Module):
    """Linear x4, exact GELU, linear."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, 4 * dim)
        self.fc2 = Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.fc2(linear(x, self.fc1.weight, self.fc1.bias, with_gelu=True))


class SwiGlu(nn.Module):
    """Gated feed-forward network; hidden width = 4C * 2/3, rounded up to a multiple of 8."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = (int(4 * dim * 2 / 3) + 7) // 8 * 8
        self.w12 = Linear(dim, 2 * hidden)
        self.w3 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        gate, up = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * up)


class LayerScale(nn.Module):
    """A learned factor for each channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = SelfAttention(dim, config.num_heads)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = SwiGlu(dim) if config.ffn is Ffn.swiglu else Mlp(dim)
        self.ls2 = LayerScale(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


def run_block(block: nn.Module, *inputs: Tensor, recompute: bool) -> Tensor:
    """`block(*inputs)`; with `recompute` its activations are recomputed in the backward pass instead of kept."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return block(*inputs)


class PatchEmbed(nn.Module):
    """Images to patch tokens."""

    def __init__(self, dim: int, patch_size_px: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size_px, stride=patch_size_px)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, L, C), patches in row-major order.

        A matrix product, not `conv2d`, whose fp32 is rounded to TF32 on a GPU by default. The patches are `F.unfold`'s,
        which launches a kernel for each image there.
        """
        rows_px, columns_px = self.proj.kernel_size
        patches = images.unflatten(3, (-1, columns_px)).unflatten(2, (-1, rows_px)).permute(0, 1, 3, 5, 2, 4)
        return F.linear(patches.flatten(4).flatten(1, 3).transpose(1, 2), self.proj.weight.flatten(1), self.proj.bias)


class VisionTransformer(nn.Module):
    """DINOv2 ViT. Everything before the last `num_trainable_blocks` blocks is frozen.

    `checkpoint_activations`: training recomputes the activations of the blocks instead of keeping them.
    """

    checkpoint_activations = False

    def __init__(self, config: EncoderConfig, patch_size_px: int) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        num_stored_patches = (config.pretrain_image_size_px // patch_size_px) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + num_stored_patches, dim))
        if config.num_registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, config.num_registers, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.patch_embed = PatchEmbed(dim, patch_size_px)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.freeze_all_but_last_blocks()

    def freeze_all_but_last_blocks(self) -> None:
        """Leave the last `num_trainable_blocks` blocks and the final norm trainable, and nothing else."""
        first_trainable = self.config.depth - self.config.num_trainable_blocks
        trainable = {f"blocks.{index}" for index in range(first_trainable, self.config.depth)} | {"norm"}
        for name, parameter in self.named_parameters():
            owner = ".".join(name.split(".")[:2]) if name.startswith("blocks.") else name.split(".")[0]
            parameter.requires_grad_(owner in trainable)

    def resize_positions(self, grid_size: int) -> None:
        """Keep the learned positions at this grid alone: for inference, which else resizes them at each pass."""
        self.pos_embed = nn.Parameter(self._positions(grid_size).detach(), requires_grad=False)

    def _positions(self, grid_size: int) -> Tensor:
        """(1, 1 + L, C)."""
        return resize_encoder_table(
            self.pos_embed,
            grid_size,
            antialias=self.config.pos_embed_antialias,
            offset=self.config.pos_embed_offset,
        )

    def forward(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) normalised images -> class token (B, C) and patches (B, L, C), both normalised.

        `mask` (B, L) bool: patches under it are replaced by the mask token before positions are added.
        """
        tokens = self.patch_embed(images)
        if mask is not None:
            tokens = torch.where(mask.unsqueeze(-1), self.mask_token.to(tokens.dtype), tokens)
        positions = self._positions(int(tokens.shape[1] ** 0.5))
        class_token = self.cls_token + positions[:, :1]
        prefix = [class_token.expand(len(tokens), -1, -1)]
        if self.config.num_registers:
            prefix.append(self.register_tokens.expand(len(tokens), -1, -1))
        x = torch.cat([*prefix, tokens + positions[:, 1:]], dim=1)
        for block in self.blocks:
            x = run_block(block, x, recompute=self.checkpoint_activations)
        x = self.norm(x)
        return x[:, 0], x[:, 1 + self.config.num_registers :]
