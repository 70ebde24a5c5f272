"""Photos that can't be read when re-ranking needs them: each costs itself alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from pairvpr.data.images import BrokenImageError

Loaded = TypeVar("Loaded")


class Unreadable:
    """`reasons` by image id, of photos that were asked for and could not be read, and of those `known` from the start.

    Something of the same shape stands in for such a photo, so that its neighbours pass through the network in the same
    shapes as with it, and get the same scores. What is computed from it is left out.
    """

    def __init__(self, known: Mapping[int, str] | None = None) -> None:
        self.reasons = dict(known or {})

    def guarded(self, load: Callable[[int], Loaded], stand_in: Callable[[], Loaded]) -> Callable[[int], Loaded]:
        """`load`, which raises `BrokenImageError`, with a stand-in instead. Threads may share it."""

        def loaded(image_id: int) -> Loaded:
            if image_id in self.reasons:
                return stand_in()
            try:
                return load(image_id)
            except BrokenImageError as error:
                self.reasons[image_id] = str(error)
                return stand_in()

        return loaded
