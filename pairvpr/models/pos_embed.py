"""Position tables: the decoder's fixed sine-cosine one, and resizing of learned and fixed ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sine_cosine_2d(embed_dim: int, grid_size: int) -> Tensor:
    """(grid_size^2, embed_dim) float32 table, patches in row-major order (method, section 2).

    The first half of the width codes the column, the second the row; each half is [sin(p w_i), cos(p w_i)] with
    w_i = 10000^(-i / (embed_dim / 4)).
    """
    quarter = embed_dim // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = line.repeat(grid_size, 1)
    rows = line.repeat_interleave(grid_size, dim=0)
    return torch.cat([columns, rows], dim=1).float()


def resize_encoder_table(table: Tensor, grid_size: int, *, antialias: bool, offset: float) -> Tensor:
    """The encoder's learned table (1, 1 + N^2, C) for another grid: (1, 1 + grid_size^2, C), bicubic, in fp32.

    The class token's row is kept. With an `offset` the factor is (grid_size + offset) / N, as DINOv2 models
    without registers were trained; without one the output size is given. The stored grid is used as it is.
    """
    stored_size = int((table.shape[1] - 1) ** 0.5)
    if stored_size == grid_size:
        return table

    def resize(patches: Tensor) -> Tensor:
        """(1, N^2, any) -> (1, grid_size^2, any)."""
        image = patches.unflatten(1, (stored_size, stored_size)).permute(0, 3, 1, 2)
        if offset:
            factor = (grid_size + offset) / stored_size
            image = F.interpolate(image, scale_factor=(factor, factor), mode="bicubic", antialias=antialias)
        else:
            image = F.interpolate(image, size=(grid_size, grid_size), mode="bicubic", antialias=antialias)
        return image.permute(0, 2, 3, 1).flatten(1, 2)

    patches = table[:, 1:].float()
    if table.requires_grad and table.is_cuda:
        # torch adds up the gradient of an interpolation in no fixed order on a GPU; that of a product has one.
        resized = resize(torch.eye(stored_size**2, device=table.device).unsqueeze(0)) @ patches
    else:
        resized = resize(patches)
    return torch.cat([table[:, :1], resized.to(table.dtype)], dim=1)


def resize_decoder_table(table: Tensor, grid_size: int) -> Tensor:
    """The decoder's table (N^2, D) for another grid: (grid_size^2, D), bicubic. The stored grid is used as it is."""
    stored_size = int(len(table) ** 0.5)
    if stored_size == grid_size:
        return table
    patches = table.unflatten(0, (stored_size, stored_size)).permute(2, 0, 1).unsqueeze(0)
    resized = F.interpolate(patches, size=(grid_size, grid_size), mode="bicubic", align_corners=False)
    return resized.squeeze(0).permute(1, 2, 0).flatten(0, 1)
