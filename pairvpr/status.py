"""`pairvpr status OUT`: how far a job is, from its output directory alone, on any machine that can read it.

A job keeps `status.json` in its output: what it said last, and when it was last alive. The file takes no part in any
result, and a job that can't write it goes on. Neither torch nor Ray is needed.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from pairvpr.data import sealed, storage
from pairvpr.errors import UserError
from pairvpr.machine import in_a_line
from pairvpr.secrets import without_secrets
from pairvpr.terminal import heard_by

FILE = "status.json"
SECONDS_BETWEEN_SIGNS = 10.0
NUM_LINES = 5
SECONDS_FOR_LAST_WORD = 10.0
"""A store that is gone must not keep a job from ending."""
SIGNS_MISSED = 3
FINISHED_FILES = ("metrics.json", "manifest.json", "checkpoints.csv")
"""The last file that each kind of job writes; a training has none such."""
REMEDY = "the job that runs there writes it anew"


class State(StrEnum):
    """Of a job, as it says itself."""

    running = "running"
    finished = "finished"
    stopped = "stopped"


@dataclass(frozen=True, kw_only=True)
class Status:
    """The content of `status.json`. Times are UTC, ISO 8601, by the clock of the job's machine."""

    job: str
    state: State
    host: str
    process: int
    started: str
    updated: str
    lines: list[str]
    """What the job said last, oldest first."""

    @property
    def silent_s(self) -> float:
        """Seconds since the job's last sign of life, if its clock and ours agree."""
        return (datetime.now(UTC) - datetime.fromisoformat(self.updated)).total_seconds()

    @property
    def took(self) -> timedelta:
        """From the start to the last sign."""
        return datetime.fromisoformat(self.updated) - datetime.fromisoformat(self.started)


@contextmanager
def published(output: str, job: str) -> Iterator[None]:
    """Within the block, `output`/status.json says every few seconds what the job says; then how the job ended."""
    lines: deque[str] = deque(maxlen=NUM_LINES)
    started = _now()
    ended = threading.Event()
    status = Status(
        job=job,
        state=State.running,
        host=socket.gethostname(),
        process=os.getpid(),
        started=started,
        updated=started,
        lines=[],
    )
    last = status

    def keep_writing() -> None:
        is_over = False
        while not is_over:
            write(output, replace(last, updated=_now(), lines=list(lines)))
            is_over = ended.wait(SECONDS_BETWEEN_SIGNS)
        write(output, replace(last, updated=_now(), lines=list(lines)))

    writer = threading.Thread(target=keep_writing, name="status", daemon=True)
    writer.start()
    try:
        with heard_by(lines.append):
            yield
        last = replace(status, state=State.finished)
    except BaseException as error:
        lines.append(without_secrets(in_a_line(error) if isinstance(error, OSError) else storage.reason(error)))
        last = replace(status, state=State.stopped)
        raise
    finally:
        ended.set()
        writer.join(SECONDS_FOR_LAST_WORD)


def write(output: str, status: Status) -> None:
    """Publish a status; a store that does not take it costs nothing but the status."""
    with suppress(OSError, UserError):
        sealed.write_json(storage.join(output, FILE), asdict(status))


def read(output: str) -> Status | None:
    """The status in an output directory, or None where there is none. Raises `DamagedFileError`."""
    url = storage.join(output, FILE)
    content = sealed.read_json(url, REMEDY)
    if content is None:
        return None
    try:
        if set(content) != {field.name for field in fields(Status)}:
            raise ValueError("other entries")
        values: dict[str, Any] = content | {"state": State(content["state"])}
        status = Status(**values)
        if not isinstance(status.lines, list) or not all(isinstance(line, str) for line in status.lines):
            raise TypeError("lines")
        _ = status.silent_s, status.took
    except (ValueError, TypeError) as error:
        raise sealed.DamagedFileError(url, f"not a status ({storage.reason(error)})", REMEDY) from error
    return status


def about(output: str) -> tuple[str, bool]:
    """What `pairvpr status` says of an output directory, and whether the job there runs or is finished.

    Raises `UserError` where no job has written.
    """
    status = read(output)
    if status is None:
        return _about_old(output)
    is_alive = status.state is not State.running or _shows_life(output, status)
    where = f"{status.host}, process {status.process}"
    head = {
        State.running: f"running on {where}, for {_text_of(status.took)}",
        State.finished: f"finished at {status.updated} after {_text_of(status.took)}",
        State.stopped: f"stopped at {status.updated} on {where}: run the same command again to continue",
    }[status.state]
    if not is_alive:
        head = (
            f"no sign of life since {status.updated} ({where}): killed, or its machine is gone; run the same "
            "command again to continue"
        )
    lines = [f"{status.job}: {head}", *(f"  {line}" for line in status.lines)]
    return "\n".join(lines), is_alive and status.state is not State.stopped


def _shows_life(output: str, status: Status) -> bool:
    """Whether a job that says it runs does. Where its last sign is old by our clock, we wait for the next one."""
    if 0 <= status.silent_s <= SIGNS_MISSED * SECONDS_BETWEEN_SIGNS:
        return True
    stop_s = time.monotonic() + SIGNS_MISSED * SECONDS_BETWEEN_SIGNS
    while time.monotonic() < stop_s:
        time.sleep(1.0)
        with suppress(sealed.DamagedFileError):
            if read(output) != status:
                return True
    return False


def _about_old(output: str) -> tuple[str, bool]:
    """Of a directory without a status: what an earlier version left there."""
    found = [name for name in FINISHED_FILES if storage.exists(storage.join(output, name))]
    if found:
        return f"{output}: finished ({', '.join(found)} there) by an earlier version, which left no {FILE}", True
    if storage.exists(storage.join(output, "settings.json")):
        return f"{output}: a job of an earlier version began there, which left no {FILE}: its end is not known", False
    raise UserError(f"{output}: no job has written there; expected the output directory of a job, with {FILE}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _text_of(time_: timedelta) -> str:
    """A duration without parts of a second."""
    return str(timedelta(seconds=round(time_.total_seconds())))


def main(arguments: Sequence[str]) -> int:
    """Print the status of each output. Exit codes: 0 running or finished, 1 stopped or silent, 2 no job there."""
    parser = argparse.ArgumentParser(
        prog="pairvpr status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("outputs", metavar="OUT", nargs="+", help="output directory (path or URL) of a job")
    found: list[Any] = []
    try:
        for output in parser.parse_args(arguments).outputs:
            text, is_well = about(storage.absolute(output))
            print(text)
            found.append(is_well)
    except (UserError, OSError) as error:
        print(f"error: {storage.reason(error)}", file=sys.stderr)
        return 2
    return 0 if all(found) else 1
