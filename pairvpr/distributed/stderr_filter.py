"""Keep one line of Ray's native code off the terminal: nobody who runs a job can act on it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

NOISE = (
    # https://github.com/ray-project/ray/issues/57733: printed for every Ray Data actor pool, whatever it is given.
    b"has constructor arguments in the object store and max_restarts > 0",
)


@contextmanager
def filtered_stderr() -> Iterator[None]:
    """Within the block, lines that hold a phrase of `NOISE` and are written to file descriptor 2 are dropped."""
    sys.stderr.flush()
    terminal = os.dup(2)
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    os.close(writer)
    thread = threading.Thread(target=_copy, args=(reader, terminal), daemon=True)
    thread.start()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(terminal, 2)  # closes the pipe's last writer here; children of this process may hold it longer
        thread.join(timeout=1.0)


def _copy(reader: int, terminal: int) -> None:
    with os.fdopen(reader, "rb", buffering=0) as lines, os.fdopen(terminal, "wb", buffering=0) as out:
        pending = b""
        while piece := lines.read(1 << 16):
            *whole, pending = (pending + piece).split(b"\n")
            kept = [line + b"\n" for line in whole if not any(phrase in line for phrase in NOISE)]
            out.write(b"".join(kept))
        out.write(pending)
