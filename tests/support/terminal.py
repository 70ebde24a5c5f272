"""A command whose standard error is a terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
from collections.abc import Sequence
from contextlib import suppress


def in_a_terminal(command: Sequence[str], term: str = "xterm-256color", *, timeout_s: float = 60) -> tuple[str, str]:
    """What a command writes on a terminal of this kind, and on standard output. Fails the test if it fails."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": term, "COLUMNS": "100", "LINES": "40"}
    child = subprocess.Popen(command, stderr=theirs, stdout=subprocess.PIPE, env=environment)
    os.close(theirs)
    written = b""
    with suppress(OSError):  # how Linux says that nobody writes there any more
        while piece := os.read(ours, 1 << 16):
            written += piece
    assert child.stdout is not None
    printed = child.stdout.read().decode()
    assert child.wait(timeout_s) == 0, written.decode()
    os.close(ours)
    return written.decode(), printed


def without_codes(written: str) -> str:
    """The text without what moves the cursor and chooses colours."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written)
