"""Until when somebody waits for an answer: work asks between its forward passes, and stops when nobody does."""

from __future__ import annotations

import math
import time
from threading import Event


class TooLateError(TimeoutError):
    """Nobody waits for this answer any more: its time is over, or it was cancelled."""


class Deadline:
    """`seconds` from now; threads may share it."""

    def __init__(self, seconds: float = math.inf) -> None:
        self._end_s = time.monotonic() + seconds
        self._is_cancelled = Event()

    @property
    def left_s(self) -> float:
        """Seconds that are left, 0 or more."""
        return 0.0 if self._is_cancelled.is_set() else max(0.0, self._end_s - time.monotonic())

    def cancel(self) -> None:
        """Nobody waits any more."""
        self._is_cancelled.set()

    def check(self) -> None:
        """Raises `TooLateError` if nobody waits any more."""
        if self.left_s == 0.0:
            raise TooLateError("the time for this answer is over")
