"""Standard error is for the user: a job's own lines go there, and output of libraries goes to a log."""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any, TextIO, cast

from pairvpr.secrets import without_secrets

if TYPE_CHECKING:
    from rich.progress import Progress

_terminal: TextIO | None = None
"""Where `say` writes while standard error is a log."""
_listeners: list[Callable[[str], object]] = []
_bar: Progress | None = None
"""What is drawn at the terminal's lower edge."""


def say(text: str) -> None:
    """One line for the person who watches; if nobody does any more, the work goes on."""
    line = without_secrets(text)
    _tell(line)
    drawn = _bar  # another thread may end it
    with suppress(OSError, ValueError):
        if drawn is not None:
            drawn.console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=_terminal or sys.stderr, flush=True)


def say_unless_drawn(text: str) -> None:
    """The same, but where a bar shows it already, only listeners get the line."""
    if _bar is None:
        say(text)
    else:
        _tell(without_secrets(text))


def _tell(line: str) -> None:
    for listener in _listeners:
        listener(line)


@contextmanager
def bar(step: str, total: int, unit: str, *, already_done: int) -> Iterator[Callable[[int], object]]:
    """Within the block, a terminal shows how much of a step is done, how fast, and how long the rest takes.

    Yields what is called with the number that is done. A log shows nothing of it, nor does a second bar.
    """
    global _bar
    stream = _terminal or sys.stderr
    if _bar is not None or not _can_draw(stream):
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    drawn = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}, {task.fields[rate]:,.1f}/s, left", markup=False),
        TimeRemainingColumn(),
        console=Console(file=cast(IO[str], _MayGo(stream)), force_terminal=True),
        refresh_per_second=4,
        redirect_stdout=False,
        redirect_stderr=False,
        transient=True,
    )
    task = drawn.add_task(step, total=total, completed=already_done, unit=unit, rate=0.0)
    started_s = time.monotonic()

    def show(done: int) -> None:
        rate = (done - already_done) / max(time.monotonic() - started_s, 1e-9)
        drawn.update(task, completed=done, rate=rate)

    with drawn:
        _bar = drawn
        try:
            yield show
        finally:
            _bar = None


class _MayGo:
    """A terminal that may be closed while a bar is drawn on it; the work goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _can_draw(stream: TextIO) -> bool:
    with suppress(OSError, ValueError):
        return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    return False


@contextmanager
def heard_by(listener: Callable[[str], object]) -> Iterator[None]:
    """Within the block, `listener` gets every line that is said, too."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


class _OfMainThread(io.TextIOBase):
    """Standard output for the main thread; output of other threads (such as Ray's listeners) goes to the log."""

    def __init__(self, ours: TextIO, log: int) -> None:
        self._ours, self._log = ours, log

    def write(self, text: str) -> int:
        if threading.current_thread() is threading.main_thread():
            return self._ours.write(text)
        return os.write(self._log, text.encode(errors="backslashreplace"))

    def flush(self) -> None:
        self._ours.flush()

    def fileno(self) -> int:
        return self._ours.fileno()

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._ours.encoding

    def isatty(self) -> bool:
        return self._ours.isatty()


@contextmanager
def libraries_write_to(log: int) -> Iterator[None]:
    """Inside the block, only `say` and prints of the main thread reach the terminal; all else goes to `log`.

    File descriptor 2 is then `log`, in this process and its children.
    """
    global _terminal
    stdout, stderr = sys.stdout, sys.stderr
    stderr.flush()
    before = os.dup(2)
    os.dup2(log, 2)
    errors = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    terminal = stderr  # a notebook has its own
    if _is_descriptor_two(stderr):
        terminal = open(before, "w", encoding=stderr.encoding, errors="backslashreplace", closefd=False)  # noqa: SIM115
    _terminal = terminal
    sys.stdout, sys.stderr = _OfMainThread(stdout, log), errors
    try:
        yield
    finally:
        sys.stdout, sys.stderr = stdout, stderr
        for stream in (errors, terminal):
            with suppress(OSError, ValueError):
                stream.flush()
        _terminal = None
        os.dup2(before, 2)
        os.close(before)


def _is_descriptor_two(stream: TextIO) -> bool:
    try:
        return stream.fileno() == 2
    except (OSError, AttributeError):
        return False


def make_streams_usable() -> None:
    """Handle terminals that can't encode some file names, and streams closed by the caller (`2>&-`)."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            if nowhere != number:
                os.dup2(nowhere, number)
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def give_up_broken_stdout() -> None:
    """Replace a standard output that nobody reads: otherwise the interpreter fails when it flushes it at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
