"""Counts, rates and the time left while a step works: a bar in a terminal, lines in a log, metrics on a cluster."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import timedelta
from types import TracebackType

import ray

from pairvpr.distributed import metrics
from pairvpr.terminal import bar, say, say_unless_drawn

SECONDS_BETWEEN_LINES = 5.0
SECONDS_OF_SILENCE = 10.0


class Progress:
    """Says how many of `total` are done and how fast: at the start of a step, every few seconds, at its end.

    A context manager for the step: within it, a terminal shows a bar, and a log gets a line at least every
    `SECONDS_OF_SILENCE`, also while nothing gets done; it then says what is free in the cluster. The last line comes
    only where the step ends without an error. `unit` is one of those that `metrics.COUNTED` names.
    """

    def __init__(self, step: str, total: int, unit: str, *, already_done: int = 0) -> None:
        self.step, self.total, self.unit = step, total, unit
        self.done = self.already_done = already_done
        self._started_s = self._said_s = self._added_s = time.monotonic()
        self._is_over = threading.Event()
        self._drawn = ExitStack()
        self._draw: Callable[[int], object] = lambda _: None
        self._watcher = threading.Thread(target=self._break_silence, name=f"progress of {step}", daemon=True)
        resumed = f" ({already_done:,} kept from an earlier run)" if already_done else ""
        say(f"{step}: {total:,} {unit}{resumed}")

    def __enter__(self) -> Progress:
        self._draw = self._drawn.enter_context(bar(self.step, self.total, self.unit, already_done=self.done))
        self._watcher.start()
        self._record(time.monotonic())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._watcher.join()
        self._drawn.close()
        if kind is None:
            now_s = time.monotonic()
            say(f"{self.step}: done in {now_s - self._started_s:.1f} s, {self._rate(now_s)}")

    def add(self, count: int) -> None:
        """Count `count` more as done."""
        self.done += count
        now_s = self._added_s = time.monotonic()
        metrics.COUNTED[self.unit].record(count, step=self.step)
        self._record(now_s)
        self._draw(self.done)
        if self.done < self.total and now_s - self._said_s >= SECONDS_BETWEEN_LINES:
            self._said_s = now_s
            say_unless_drawn(f"{self._done()}, {self._rate(now_s)}, {self._left(now_s)}")

    def _record(self, now_s: float) -> None:
        rate_per_s = self._per_s(now_s)
        metrics.show_progress(self.step, self.unit, done=self.done, total=self.total, rate_per_s=rate_per_s)

    def _done(self) -> str:
        return f"{self.step}: {self.done:,}/{self.total:,} {self.unit}"

    def _per_s(self, now_s: float) -> float:
        return (self.done - self.already_done) / max(now_s - self._started_s, 1e-9)

    def _rate(self, now_s: float) -> str:
        return f"{self._per_s(now_s):,.1f} {self.unit}/s"

    def _left(self, now_s: float) -> str:
        seconds = (self.total - self.done) * (now_s - self._started_s) / max(self.done - self.already_done, 1)
        return f"about {timedelta(seconds=round(seconds))} left"

    def _break_silence(self) -> None:
        wait_s = SECONDS_OF_SILENCE
        while not self._is_over.wait(min(wait_s, SECONDS_BETWEEN_LINES)):
            now_s = time.monotonic()
            self._record(now_s)
            wait_s = self._said_s + SECONDS_OF_SILENCE - now_s
            if wait_s <= 0:
                self._said_s = now_s
                say(f"{self._done()}, no more for {now_s - self._added_s:.0f} s{_free()}")
                wait_s = SECONDS_OF_SILENCE


def _free() -> str:
    """What of the cluster is free, as far as Ray answers: why a job waits where others hold everything."""
    with suppress(Exception):  # Ray may be going down just now
        there, free = ray.cluster_resources(), ray.available_resources()
        counts = [f"{free.get(name, 0):g} of {there.get(name, 0):g} {name}s" for name in ("CPU", "GPU")]
        return f" (free in the cluster: {' and '.join(counts)})"
    return ""
