"""Losses of both stages, and the pair mining of stage two. Method, sections 4 and 5.

B images, L patches, G descriptor width, P patch side in pixels, S image side in pixels, N pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pairvpr.models.pair_vpr import sent

TARGET_VARIANCE_EPS = 1e-6


@cache
def _mining() -> tuple[Any, Any, Any]:
    """The multi-similarity miner, the batch-hard miner and the multi-similarity loss: stage two alone needs them."""
    from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity
    from pytorch_metric_learning.losses import MultiSimilarityLoss
    from pytorch_metric_learning.miners import BatchHardMiner, MultiSimilarityMiner

    return (
        MultiSimilarityMiner(epsilon=0.1, distance=CosineSimilarity()),
        BatchHardMiner(distance=CosineSimilarity()),
        MultiSimilarityLoss(alpha=1, beta=50, base=0.0, distance=DotProductSimilarity()),
    )


def patches_of(images: Tensor, patch_size_px: int) -> Tensor:
    """(B, 3, S, S) -> (B, L, P * P * 3): patches in row-major order, each flattened as row, column, channel."""
    patches = images.unflatten(3, (-1, patch_size_px)).unflatten(2, (-1, patch_size_px))
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def reconstruction_losses(prediction: Tensor, images: Tensor, mask: Tensor, *, norm_pix_loss: bool) -> Tensor:
    """Stage one's loss per image: (B,) float32, the mean squared error over its masked patches.

    prediction (B, L, P * P * 3); images (B, 3, S, S), normalised and unmasked; mask (B, L) bool, True = hidden.
    `norm_pix_loss`: each target patch is normalised by its own mean and (unbiased) variance + 1e-6. All images hide
    equally many patches, so the mean of these losses is the mean over all masked patches.
    """
    patch_size_px = round((prediction.shape[-1] / 3) ** 0.5)
    target = patches_of(images.float(), patch_size_px)
    if norm_pix_loss:
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - mean) / (variance + TARGET_VARIANCE_EPS).sqrt()
    patch_losses = (prediction.float() - target).square().mean(dim=-1)
    return (patch_losses * mask).sum(dim=1) / mask.sum(dim=1)


@dataclass(frozen=True)
class MinedPairs:
    """Rows (N,) int64 of a batch: the multi-similarity miner's pairs, and each photo's hardest positive and negative.

    Photos without a positive or without a negative in the batch are not hard anchors.
    """

    anchor_positive: Tensor
    positive: Tensor
    anchor_negative: Tensor
    negative: Tensor
    hard_anchor: Tensor
    hard_positive: Tensor
    hard_negative: Tensor


@torch.no_grad()
def mine_pairs(descriptors: Tensor, labels: Tensor) -> MinedPairs:
    """Mine a batch by descriptor: (B, G) float32, labels (B,) int64 (equal = same place)."""
    multi_similarity_miner, batch_hard_miner, _ = _mining()
    return MinedPairs(*multi_similarity_miner(descriptors, labels), *batch_hard_miner(descriptors, labels))


def multi_similarity_loss(descriptors: Tensor, labels: Tensor, pairs: MinedPairs) -> Tensor:
    """() float32 of descriptors (B, G) and labels (B,): alpha 1, beta 50, base 0, dot product, over the mined pairs."""
    rows = (pairs.anchor_positive, pairs.positive, pairs.anchor_negative, pairs.negative)
    indices = tuple(sent(its, descriptors.device) for its in rows)
    _, _, loss = _mining()
    return loss(descriptors, labels, indices)


def batch_accuracy(pairs: MinedPairs, num_photos: int) -> float:
    """Share of the photos that are not the anchor of any positive pair of the multi-similarity miner."""
    return 1 - len(pairs.anchor_positive.unique()) / num_photos


def pair_loss_sum(logit_positive: Tensor, logit_negative: Tensor) -> Tensor:
    """() sum of the binary cross-entropies of positive and negative logits (N,), with labels 1 and 0."""
    logits = torch.cat([logit_positive, logit_negative])
    targets = torch.cat([torch.ones_like(logit_positive), torch.zeros_like(logit_negative)])
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
