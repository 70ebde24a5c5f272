"""Networks as users bring them (`descriptor.module=tests.support.user_networks:wide`): random weights from a seed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH = 8448
SIDE_PX = 28


class Wide(nn.Module):
    """As wide as MegaLoc or SALAD: photos (B, 3, 28, 28) -> (B, 8448), not of unit length."""

    def __init__(self) -> None:
        super().__init__()
        self.small: nn.Module = nn.AvgPool2d(2)
        self.layer = nn.Linear(3 * (SIDE_PX // 2) ** 2, WIDTH)

    def forward(self, photos: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.small(photos).flatten(1)))


class Squared(Wide):
    """Of the same weights, another function."""

    def forward(self, photos: Tensor) -> Tensor:
        return super().forward(photos) ** 2


def wide() -> Wide:
    torch.manual_seed(11)
    return Wide()


def of_any_side() -> Wide:
    """Takes photos of every side."""
    network = wide()
    network.small = nn.AdaptiveAvgPool2d(SIDE_PX // 2)
    return network


def squared() -> Squared:
    torch.manual_seed(11)
    return Squared()
