"""How errors leave a job: one line for the user, an exit code, and everything else in a log file.

Anything but a `UserError`, an `IncompleteRunError` or an operating system error is a bug in the program. Its line names
the log, which has tracebacks and all output of Ray, torch and other libraries.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

from pairvpr.data.storage import StorageError, reason
from pairvpr.errors import IncompleteRunError, UserError
from pairvpr.machine import in_a_line
from pairvpr.needed import PACKAGES, lack
from pairvpr.secrets import without_secrets
from pairvpr.terminal import give_up_broken_stdout, libraries_write_to, make_streams_usable, say

KEPT = "finished work is kept"
GOES_ON = f"{KEPT}: run the same command again to continue"
SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class StoppedError(BaseException):
    """The process received a signal of this name to terminate."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    exit_code: int
    line: str | None = None
    has_log: bool = False
    """Whether the log contains more than the line."""

    def __str__(self) -> str:
        """The line, without secrets; line breaks and unprintable characters are escaped."""
        line = without_secrets(self.line or "")
        return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)


def exit_code_of(work: Callable[[], object]) -> int:
    """Run `work` in this process. 0: done, 1: incomplete, 2: a user's mistake, 130: interrupted.

    Lines from `say` go to standard error; all other output there goes to a log, which is kept if something failed.
    """
    make_streams_usable()
    log, name = _open_log()
    with _last_word(name), libraries_write_to(log):
        try:
            with _stopped_by_signals():
                work()
                sys.stdout.flush()
            outcome = Outcome(0)
        except BaseException as error:
            outcome = outcome_of(error)
            with suppress(OSError):
                text = without_secrets("".join(traceback.format_exception(error)))
                os.write(log, text.encode(errors="backslashreplace"))
        if outcome.line is not None:
            say(f"{outcome} (full text: {name})" if outcome.has_log and name else str(outcome))
    if name and not outcome.has_log:
        with suppress(OSError):
            os.unlink(name)
    os.close(log)
    give_up_broken_stdout()
    return outcome.exit_code


def outcome_of(error: BaseException) -> Outcome:
    """The outcome for an error: from the first exception in its chain of causes that is meant for users."""
    for cause in _causes(error):
        if isinstance(cause, UserError):
            return Outcome(2, f"error: {reason(cause)}")
        if isinstance(cause, IncompleteRunError):
            return Outcome(1, f"incomplete: {reason(cause)}", has_log=cause.__cause__ is not None)
        if isinstance(cause, KeyboardInterrupt):
            return Outcome(130, f"interrupted: {GOES_ON}")
        if isinstance(cause, StoppedError):
            return Outcome(1, f"stopped by {cause}: {GOES_ON}")
        if isinstance(cause, SystemExit) and cause.code in SIGNALS:  # from Ray's own handler, while Ray starts
            return Outcome(1, f"stopped by {signal.Signals(cause.code).name}: {GOES_ON}")
        if isinstance(cause, ModuleNotFoundError):
            line = lack(PACKAGES.keys() & {(cause.name or "").partition(".")[0]})
            if line is not None:
                return Outcome(2, f"error: {line}")
        if isinstance(cause, StorageError):
            return Outcome(1, f"error: {reason(cause)}; {KEPT}", has_log=True)
        if isinstance(cause, BrokenPipeError) and cause.filename is None:
            return Outcome(1, f"error: standard output was closed before everything was printed; {KEPT}")
        if isinstance(cause, OSError | MemoryError):
            return Outcome(1, f"error: {in_a_line(cause)}; {KEPT}", has_log=True)
        if type(cause).__module__.startswith("ray."):
            original = getattr(cause, "cause", None) or cause  # Ray's text of a task's error begins with a traceback
            return Outcome(1, f"incomplete: Ray failed: {in_a_line(original)}; {GOES_ON}", has_log=True)
    return Outcome(1, f"bug in the program, please report it: {in_a_line(error)}; {KEPT}", has_log=True)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and its explicit causes. Ray's copy of a task's error has the original as its `cause`."""
    found: BaseException | None = error
    seen: set[int] = set()
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        inner = getattr(found, "cause", None)
        if isinstance(inner, BaseException):
            yield from _causes(inner)
        yield found
        found = found.__cause__


@contextmanager
def _last_word(log: str | None) -> Iterator[None]:
    """If this process ends silently inside the block, a second process says so.

    It may be killed, and Ray's native code ends it when Ray's own processes are gone.
    """
    line = f"incomplete: the process was killed, ran out of memory, or was ended by Ray; {GOES_ON} (full text: {log})"
    try:
        show_cursor = '[ ! -t 2 ] || printf "\\033[?25h"'  # a bar of progress hides it
        command = ["sh", "-c", f'read -r over || {{ {show_cursor}; printf "%s\\n" "$0"; }} >&2', line]
        watcher = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    except OSError:
        yield
        return
    try:
        yield
    finally:
        with suppress(OSError):
            watcher.communicate(b"over\n")


def _open_log() -> tuple[int, str | None]:
    """A file descriptor for output not meant for users, and the file's name; the null device if there is no file."""
    try:
        return tempfile.mkstemp(prefix="pairvpr-", suffix=".log")
    except OSError:
        return os.open(os.devnull, os.O_WRONLY), None


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Inside the block, termination signals raise `StoppedError` in the main thread."""

    def stop(number: int, _: FrameType | None) -> None:
        raise StoppedError(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
