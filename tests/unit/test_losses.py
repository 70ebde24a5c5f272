"""Losses against loops that say the same one element at a time."""

from __future__ import annotations

import math

import pytest
import torch

from pairvpr.training.losses import (
    MinedPairs,
    batch_accuracy,
    mine_pairs,
    pair_loss_sum,
    patches_of,
    reconstruction_losses,
)

PATCH_SIZE_PX = 2


def test_patches_are_row_column_channel() -> None:
    images = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    patches = patches_of(images, PATCH_SIZE_PX)
    assert patches.shape == (2, 2 * 3, 2 * 2 * 3)
    for row, column, y, x, channel in [(0, 0, 0, 0, 0), (1, 2, 1, 0, 2), (0, 1, 0, 1, 1)]:
        pixel = images[:, channel, 2 * row + y, 2 * column + x]
        assert torch.equal(patches[:, 3 * row + column, (2 * y + x) * 3 + channel], pixel)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_reconstruction_losses(norm_pix_loss: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 4, 4, generator=generator)
    prediction = torch.randn(2, 4, 12, generator=generator)
    mask = torch.tensor([[True, False, True, True], [False, True, True, True]])
    losses = reconstruction_losses(prediction, images, mask, norm_pix_loss=norm_pix_loss)
    for image in range(2):
        of_patches = []
        for patch in mask[image].nonzero().flatten():
            target = patches_of(images, PATCH_SIZE_PX)[image, patch]
            if norm_pix_loss:
                target = (target - target.mean()) / (target.var(unbiased=True) + 1e-6).sqrt()
            of_patches.append((prediction[image, patch] - target).square().mean())
        assert losses[image].item() == pytest.approx(torch.stack(of_patches).mean().item(), rel=1e-5)
    seen = reconstruction_losses(prediction + (~mask).unsqueeze(-1), images, mask, norm_pix_loss=norm_pix_loss)
    assert torch.equal(seen, losses)  # patches that are not masked don't count


def test_hardest_pairs_are_the_extremes() -> None:
    angles = torch.tensor([0.0, 0.3, 0.9, 1.0, 1.5])
    descriptors = torch.stack([angles.cos(), angles.sin()], dim=1)
    pairs = mine_pairs(descriptors, torch.tensor([4, 4, 4, -1, 9]))
    # The last two places have one photo each: no positive, so they are no anchors.
    assert pairs.hard_anchor.tolist() == [0, 1, 2]
    assert pairs.hard_positive.tolist() == [2, 2, 0]
    assert pairs.hard_negative.tolist() == [3, 3, 3]


def test_batch_accuracy_counts_photos_without_mined_positive() -> None:
    none = torch.empty(0, dtype=torch.int64)
    pairs = MinedPairs(torch.tensor([0, 0, 3]), torch.tensor([1, 2, 4]), none, none, none, none, none)
    assert batch_accuracy(pairs, num_photos=5) == pytest.approx(3 / 5)


def test_pair_loss() -> None:
    loss = pair_loss_sum(torch.tensor([2.0]), torch.tensor([-1.0]))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)), rel=1e-5)
    assert pair_loss_sum(torch.empty(0), torch.empty(0)) == 0
