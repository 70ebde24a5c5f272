"""Counts, rates and the time left, on standard error while a step works."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from datetime import timedelta
from types import TracebackType

import ray

from pairvpr.terminal import say

SECONDS_BETWEEN_LINES = 5.0
SECONDS_OF_SILENCE = 10.0


class Progress:
    """Prints how many of `total` are done and how fast: at the start of a step, every few seconds, at its end.

    A context manager for the step: within it, a line comes at least every `SECONDS_OF_SILENCE`, also while nothing
    gets done; it then says what is free in the cluster. The last line comes only where the step ends without an error.
    """

    def __init__(self, step: str, total: int, unit: str, *, already_done: int = 0) -> None:
        self.step, self.total, self.unit = step, total, unit
        self.done = self.already_done = already_done
        self._started_s = self._said_s = self._added_s = time.monotonic()
        self._is_over = threading.Event()
        self._watcher = threading.Thread(target=self._break_silence, name=f"progress of {step}", daemon=True)
        resumed = f" ({already_done:,} kept from an earlier run)" if already_done else ""
        say(f"{step}: {total:,} {unit}{resumed}")

    def __enter__(self) -> Progress:
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._watcher.join()
        if kind is None:
            now_s = time.monotonic()
            say(f"{self.step}: done in {now_s - self._started_s:.1f} s, {self._rate(now_s)}")

    def add(self, count: int) -> None:
        """Count `count` more as done."""
        self.done += count
        now_s = self._added_s = time.monotonic()
        if self.done < self.total and now_s - self._said_s >= SECONDS_BETWEEN_LINES:
            self._say(now_s, f"{self._rate(now_s)}, {self._left(now_s)}")

    def _say(self, now_s: float, text: str) -> None:
        self._said_s = now_s
        say(f"{self.step}: {self.done:,}/{self.total:,} {self.unit}, {text}")

    def _rate(self, now_s: float) -> str:
        rate = (self.done - self.already_done) / max(now_s - self._started_s, 1e-9)
        return f"{rate:,.1f} {self.unit}/s"

    def _left(self, now_s: float) -> str:
        seconds = (self.total - self.done) * (now_s - self._started_s) / max(self.done - self.already_done, 1)
        return f"about {timedelta(seconds=round(seconds))} left"

    def _break_silence(self) -> None:
        wait_s = SECONDS_OF_SILENCE
        while not self._is_over.wait(wait_s):
            now_s = time.monotonic()
            wait_s = self._said_s + SECONDS_OF_SILENCE - now_s
            if wait_s <= 0:
                self._say(now_s, f"no more for {now_s - self._added_s:.0f} s{_free()}")
                wait_s = SECONDS_OF_SILENCE


def _free() -> str:
    """What of the cluster is free, as far as Ray answers: why a job waits where others hold everything."""
    with suppress(Exception):  # Ray may be going down just now
        there, free = ray.cluster_resources(), ray.available_resources()
        counts = [f"{free.get(name, 0):g} of {there.get(name, 0):g} {name}s" for name in ("CPU", "GPU")]
        return f" (free in the cluster: {' and '.join(counts)})"
    return ""
