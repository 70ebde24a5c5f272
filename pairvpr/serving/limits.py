"""How much is taken at the same time: threads that compute, and requests that wait for one."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pairvpr.deadline import Deadline, TooLateError
from pairvpr.serving.errors import busy

T = TypeVar("T")
LEARNT = 0.1
"""Weight of the newest request in the mean time of one."""


class Gate:
    """`num_at_once` threads, for which at most `max_waiting` pieces of work wait. Used by one event loop."""

    def __init__(self, num_at_once: int, max_waiting: int, name: str) -> None:
        self.num_at_once, self.max_waiting = num_at_once, max_waiting
        self.num_inside = 0
        """Pieces that wait or run."""
        self._free = asyncio.Semaphore(num_at_once)
        self._threads = ThreadPoolExecutor(num_at_once, name)
        self._mean_s = 0.1

    @property
    def num_waiting(self) -> int:
        """Pieces that wait."""
        return max(0, self.num_inside - self.num_at_once)

    def check(self) -> None:
        """Raises `RequestError` (503) if no further piece may wait."""
        if self.num_inside >= self.num_at_once + self.max_waiting:
            wait_s = self._mean_s * (self.num_inside + 1) / self.num_at_once
            raise busy(f"{self.num_waiting} requests wait already", max(1, math.ceil(wait_s)))

    async def run(self, work: Callable[[], T], deadline: Deadline) -> T:
        """The result of `work` in a thread. Raises `TooLateError` at the deadline, and `RequestError` if too many wait.

        A thread that still computes for nobody keeps its place until it notices that.
        """
        self.check()
        self.num_inside += 1
        loop = asyncio.get_running_loop()
        try:
            await asyncio.wait_for(self._free.acquire(), _left_s(deadline))
        except TimeoutError as error:
            self.num_inside -= 1
            raise TooLateError from error
        except BaseException:
            self.num_inside -= 1
            raise
        begun_s = loop.time()
        running = loop.run_in_executor(self._threads, work)

        def leave(_: asyncio.Future[T]) -> None:
            self.num_inside -= 1
            self._free.release()
            self._mean_s += LEARNT * (loop.time() - begun_s - self._mean_s)
            if not running.cancelled():
                running.exception()  # somebody has looked, also where nobody waits any more

        running.add_done_callback(leave)
        try:
            done, _ = await asyncio.wait([running], timeout=_left_s(deadline))
        except asyncio.CancelledError:
            deadline.cancel()
            raise
        if not done:
            deadline.cancel()
            raise TooLateError
        return running.result()

    def close(self) -> None:
        """End the threads, after their work."""
        self._threads.shutdown(cancel_futures=True)


def _left_s(deadline: Deadline) -> float | None:
    return deadline.left_s if math.isfinite(deadline.left_s) else None
