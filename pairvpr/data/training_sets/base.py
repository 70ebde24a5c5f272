"""What every training set answers: how many places it has, and which views show a place."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from numpy.random import Generator


@dataclass(frozen=True, slots=True)
class View:
    """What a sample shows: a photo, or the crop of a panorama that begins at column `left_px` and may wrap around."""

    url: str
    left_px: int | None = None


class TrainingSet(Protocol):
    """Places with enough photos each; a place is a number from 0 to `len` - 1."""

    @property
    def name(self) -> str:
        """As in `train.datasets`."""
        ...

    def __len__(self) -> int:
        """Number of places."""
        ...

    def draw(self, place: int, count: int, rng: Generator, broken: Collection[str] = ()) -> list[View]:
        """`count` different views of a place, drawn by `rng` alone.

        None of them is of a URL in `broken`; fewer than `count` are returned where the place has no more.
        """
        ...
