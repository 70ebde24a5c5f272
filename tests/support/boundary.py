"""A process that does some lines as a job does its work, under whatever a shell does to it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import ROOT

JOB = """
import os, signal, sys, threading, time, warnings
from pathlib import Path
from pairvpr.boundary import exit_code_of
from pairvpr.data import storage
from pairvpr.errors import IncompleteRunError, UserError

def work():
    os.write(2, b"noise of native code\\n")
    warnings.warn("noise of a library")
    thread = threading.Thread(target=print, args=("noise of a listener",))
    thread.start()
    thread.join()
    print("the table", flush=True)
    {}

sys.exit(exit_code_of(work))
"""


def ended(*lines: str, shell: str = '"$@"', env: dict[str, str] | None = None) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a process that does `lines` as a job does its work."""
    code = JOB.format("\n    ".join(lines))
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | (env or {})
    found = subprocess.run(
        ["bash", "-c", shell, "bash", sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return found.returncode, found.stdout, found.stderr


def the_line(error: str, *words: str) -> None:
    """One line with these words; the log that it names holds the noise and the traceback, and is deleted."""
    assert error.count("\n") == 1, error
    assert all(word in error for word in words), error
    if "full text: " in error:
        log = Path(error.rpartition("full text: ")[2].strip(" )\n"))
        text = log.read_text()
        log.unlink()
        assert "noise of native code" in text
        assert "noise of a library" in text
        assert "noise of a listener" in text


def mounted(command: str) -> str:
    """A shell line that runs the job after `command` in mounts of its own; skips the test where that is not allowed."""
    probe = ["unshare", "-m", "bash", "-c", command]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    return f'exec unshare -m bash -c \'{command} && exec "$@"\' bash "$@"'
