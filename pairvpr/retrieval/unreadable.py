"""Photos that can't be read during re-ranking: a broken photo affects no other photo."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from pairvpr.data.images import BrokenImageError

Loaded = TypeVar("Loaded")


class Unreadable:
    """`reasons` by image id, for photos that could not be read and those `known` from the start.

    A placeholder of the same shape keeps the shapes of forward passes, so that all other photos get the same scores.
    Results computed from a placeholder are discarded.
    """

    def __init__(self, known: Mapping[int, str] | None = None) -> None:
        self.reasons = dict(known or {})

    def guarded(self, load: Callable[[int], Loaded], stand_in: Callable[[], Loaded]) -> Callable[[int], Loaded]:
        """`load`, with a placeholder instead of a `BrokenImageError`. Threads may share it."""

        def loaded(image_id: int) -> Loaded:
            if image_id in self.reasons:
                return stand_in()
            try:
                return load(image_id)
            except BrokenImageError as error:
                self.reasons[image_id] = str(error)
                return stand_in()

        return loaded
