"""A function called in a process of its own, which ends with it: what it took in seconds and in memory.

    ran = call(function, *arguments)

The function is named by its module, which must not be the one that `python -m` started; arguments and answer are
pickled. Memory is that of `/proc/self/status`, so of Linux. (`getrusage` would do for no child of a large process: its
peak begins at what the parent held.)
"""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pairvpr.distributed.progress import say

T = TypeVar("T")

SECONDS_BETWEEN_LOOKS = 0.02


@dataclass(frozen=True)
class Ran(Generic[T]):
    """One call: its answer, its seconds (the start of the process apart), and memory of the whole process.

    `start_bytes` were resident before the work began. Of the peak, `peak_anonymous_bytes` (looked at every 20 ms) are
    no pages of files, which the system drops when it needs room.
    """

    what: str
    answer: T
    seconds: float
    start_bytes: int
    peak_bytes: int
    peak_anonymous_bytes: int


def call(function: Callable[..., T], *arguments: Any) -> Ran[T]:
    """`function(*arguments)` in a process of its own. Raises `ChildProcessError` where it fails; stderr says why."""
    with tempfile.TemporaryDirectory(prefix="pairvpr-") as folder:
        request, response = Path(folder) / "request", Path(folder) / "response"
        request.write_bytes(pickle.dumps((function.__module__, function.__qualname__, arguments)))
        command = [sys.executable, "-m", "benchmarks.fresh_process", str(request), str(response)]
        status = subprocess.run(command, stdout=sys.stderr).returncode
        if status:
            raise ChildProcessError(f"{function.__qualname__} ended with status {status}; its stderr says why")
        return Ran(function.__qualname__, *pickle.loads(response.read_bytes()))


class FreshProcesses:
    """A `Runner` (pairvpr.index.make) that gives each piece of work a process of its own, and keeps what each took."""

    def __init__(self) -> None:
        self.ran = list[Ran[None]]()

    def run(self, label: str, work: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """One after another."""
        answers = []
        for one in arguments:
            ran = call(work, *one)
            answers.append(ran.answer)
            took = (ran.seconds, ran.start_bytes, ran.peak_bytes, ran.peak_anonymous_bytes)
            self.ran.append(Ran(ran.what, None, *took))
        seconds = sum(ran.seconds for ran in self.ran[len(self.ran) - len(arguments) :])
        say(f"  {label or work.__name__}: {len(arguments)} pieces of work in {seconds:.1f} s")
        return answers

    def say(self, line: str) -> None:
        """On stderr."""
        say(f"  {line}")


def memory_bytes() -> dict[str, int]:
    """This process's lines of `/proc/self/status` that are sizes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


class _Watch(threading.Thread):
    """Looks how much memory is no page of a file."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_anonymous_bytes = 0
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_LOOKS):
            self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, memory_bytes()["RssAnon"])

    def end(self) -> None:
        self._ended.set()
        self.join()


def main() -> None:
    """The process of one call."""
    request, response = map(Path, sys.argv[1:3])
    module, name, arguments = pickle.loads(request.read_bytes())
    function = getattr(importlib.import_module(module), name)
    start_bytes = memory_bytes()["VmRSS"]
    watch = _Watch()
    watch.start()
    start_s = time.perf_counter()
    answer = function(*arguments)
    seconds = time.perf_counter() - start_s
    watch.end()
    peak_bytes = memory_bytes()["VmHWM"]
    response.write_bytes(pickle.dumps((answer, seconds, start_bytes, peak_bytes, watch.peak_anonymous_bytes)))


if __name__ == "__main__":
    main()
