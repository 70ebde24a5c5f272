"""The interface of a training set: its number of places, and views of each place."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from numpy.random import Generator


@dataclass(frozen=True, slots=True)
class View:
    """A view: a photo, or the crop of a panorama that begins at column `left_px` and may wrap around."""

    url: str
    left_px: int | None = None


class TrainingSet(Protocol):
    """Places with enough photos; a place is a number from 0 to `len` - 1."""

    @property
    def name(self) -> str:
        """As in `train.datasets`."""
        ...

    def __len__(self) -> int:
        """Number of places."""
        ...

    @property
    def places_sha256(self) -> str:
        """Digest of the places and the paths of their photos below the set's root, in order: what is drawn from."""
        ...

    def draw(self, place: int, count: int, rng: Generator, broken: Collection[str] = ()) -> list[View]:
        """`count` different views of a place, drawn only by `rng`.

        None has a URL in `broken`; returns fewer than `count` if the place has no more.
        """
        ...
