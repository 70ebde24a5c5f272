"""Counts and rates on standard error while a step works."""

from __future__ import annotations

import time

from pairvpr.terminal import say

SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Prints how many of `total` are done and how fast: at the start of a step, every few seconds, at its end."""

    def __init__(self, step: str, total: int, unit: str, *, already_done: int = 0) -> None:
        self.step, self.total, self.unit = step, total, unit
        self.done = self.already_done = already_done
        self._started_s = self._said_s = time.monotonic()
        resumed = f" ({already_done:,} kept from an earlier run)" if already_done else ""
        say(f"{step}: {total:,} {unit}{resumed}")

    def add(self, count: int) -> None:
        """Count `count` more as done."""
        self.done += count
        now_s = time.monotonic()
        if self.done < self.total and now_s - self._said_s >= SECONDS_BETWEEN_LINES:
            self._said_s = now_s
            say(f"{self.step}: {self.done:,}/{self.total:,} {self.unit}, {self._rate(now_s)}")

    def finish(self) -> None:
        """Print the step's last line."""
        now_s = time.monotonic()
        say(f"{self.step}: done in {now_s - self._started_s:.1f} s, {self._rate(now_s)}")

    def _rate(self, now_s: float) -> str:
        rate = (self.done - self.already_done) / max(now_s - self._started_s, 1e-9)
        return f"{rate:,.1f} {self.unit}/s"
