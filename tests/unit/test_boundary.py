"""Where errors leave a job: real failures of a real process, each one line and an exit code, with nothing around it."""

from __future__ import annotations

import errno
import os
import signal
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import RayTaskError

from pairvpr.boundary import outcome_of
from pairvpr.data import storage
from pairvpr.errors import IncompleteRunError, UserError
from tests.support.boundary import ended, mounted, the_line

NOBODY = 65534


def test_a_job_that_ends_well_says_nothing_and_leaves_no_log(tmp_path: Path) -> None:
    assert ended("pass", env={"TMPDIR": str(tmp_path)}) == (0, "the table\n", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "exit_code", "words"),
    [
        ("raise UserError('a=1: expected 2')", 2, ["error: a=1: expected 2\n"]),
        ("raise IncompleteRunError('half')", 1, ["incomplete: half\n"]),
        ("raise IncompleteRunError('half') from KeyError(1)", 1, ["incomplete: half (full text: "]),
        ("{}['key']", 1, ["bug in the program, please report it: KeyError: 'key'", "full text"]),
        ("open('/none/ü', 'wb')", 1, ["error: /none/ü: No such file or directory", "full text"]),
        ("open('/' + 'x' * 300, 'wb')", 1, ["File name too long; expected shorter names"]),
        ("sys.modules['s3fs'] = None; import s3fs.core", 2, ['lacks s3fs; expected pip install "pairvpr[cpu]"\n']),
        ("import no_such_module", 1, ["bug in the program, please report it: ModuleNotFoundError: No module named"]),
        ("bytearray(1 << 60)", 1, ["error: this machine has no memory left; expected more of it"]),
        ("raise KeyboardInterrupt", 130, ["interrupted: finished work is kept: run the same command again"]),
        (
            "os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)",
            1,
            ["stopped by SIGTERM: ", "run the same command again"],
        ),
        ("sys.exit(signal.SIGTERM)", 1, ["stopped by SIGTERM: "]),
        pytest.param(
            "os.kill(os.getpid(), signal.SIGHUP); time.sleep(30)",
            1,
            ["stopped by SIGHUP: "],
            marks=pytest.mark.skipif(
                signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, reason="started by nohup, which ignores SIGHUP"
            ),
        ),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ["incomplete: the process was killed", "full text"]),
        ("os._exit(1)", 1, ["incomplete: the process was killed, ran out of memory, or was ended by Ray", "full text"]),
        ("os.abort()", -signal.SIGABRT, ["incomplete: the process was killed", "full text"]),
    ],
)
def test_one_line(line: str, exit_code: int, words: list[str]) -> None:
    code, out, error = ended(line, shell='exec "$@"')
    assert (code, out) == (exit_code, "the table\n")
    the_line(error, *words)


def test_an_error_of_a_ray_task_is_its_own_line_not_its_traceback() -> None:
    cause = RuntimeError("Failed to bind to address '127.0.0.1:8700'.\nand more")
    error = RayTaskError("ready", "\x1b[36mray::ProxyActor.ready()\x1b[39m\n many lines", cause).as_instanceof_cause()
    line = str(outcome_of(error))
    assert line.startswith(
        "incomplete: Ray failed: RuntimeError: Failed to bind to address '127.0.0.1:8700'.; finished"
    )


def test_too_many_open_files() -> None:
    code, _, error = ended("files = [open('/dev/null') for _ in range(99)]", shell='ulimit -n 40; "$@"')
    assert code == 1
    the_line(error, "/dev/null: Too many open files; expected more open files: `ulimit -n 65536` (now 40)")


def test_a_closed_pipe() -> None:
    code, out, error = ended("print('x' * 100000)", shell='"$@" | true; exit ${PIPESTATUS[0]}')
    assert (code, out) == (1, "")
    the_line(error, "error: standard output was closed before everything was printed")


@pytest.mark.slow
@pytest.mark.parametrize(
    "shell", ['"$@" 2>&-', '"$@" >&- 2>&-', '{ "$@" 2>&1 >&3 | true; exit ${PIPESTATUS[0]}; } 3>&1']
)
def test_nobody_listens(shell: str) -> None:
    """What the work says is lost, and nothing else."""
    lines = ["from pairvpr.terminal import say", "for _ in range(2000): say('x' * 1000)", "raise UserError('no')"]
    code, _, error = ended(*lines, shell=shell)
    assert (code, error) == (2, "")


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}])
def test_a_terminal_that_knows_no_umlauts(environment: dict[str, str]) -> None:
    code, out, error = ended("print('\\udcff \\u00e4')", "open('/none/\\u00e4\\udcff', 'wb')", env=environment)
    assert code == 1
    assert out.startswith("the table\n")
    the_line(error, "/none/", "No such file or directory")


def test_no_place_for_the_log() -> None:
    code, _, error = ended("raise IncompleteRunError('half')", shell='ulimit -f 0; ulimit -n 12; exec "$@"')
    assert code == 1
    assert error.startswith("incomplete: half")
    assert error.count("\n") == 1


@pytest.mark.slow
def test_no_space(tmp_path: Path) -> None:
    """However a library fails that writes there, what is full is named, and not the temporary file."""
    shell = mounted(f"mount -t tmpfs -o size=64k tmpfs {tmp_path}")
    for line in (
        f"storage.write_bytes('{tmp_path}/index/ids.npy', b'0' * 100000)",
        f"with storage.written_locally('{tmp_path}/a/b') as path: import numpy; numpy.ones(99999).tofile(path)",
        f"with storage.written_locally('{tmp_path}/a') as path: import torch; torch.save(torch.ones(99999), path)",
    ):
        code, _, error = ended(line, shell=shell)
        assert code == 1
        the_line(error, f"error: {tmp_path}/", "No space left on device; expected free space there, or another place")
        assert ".tmp" not in error


def test_read_only(tmp_path: Path) -> None:
    shell = mounted(f"mount -t tmpfs -o ro tmpfs {tmp_path}")
    code, _, error = ended(f"storage.write_bytes('{tmp_path}/x', b'')", shell=shell)
    assert code == 1
    the_line(error, f"error: {tmp_path}/x: Read-only file system; expected a file system that is not mounted read-only")


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become somebody else")
def test_no_permission() -> None:
    with tempfile.TemporaryDirectory() as folder:
        code, _, error = ended(f"os.setuid({NOBODY})", f"storage.write_bytes('{folder}/x', b'')")
    assert code == 1
    the_line(error, f"error: {folder}/x: Permission denied; expected permission for user nobody, or another place")


ERRORS = st.one_of(
    st.builds(UserError, st.text()),
    st.builds(IncompleteRunError, st.text()),
    st.builds(storage.StorageError, st.text()),
    st.builds(
        OSError, st.sampled_from(sorted(errno.errorcode)), st.text(), st.one_of(st.none(), st.text(), st.binary())
    ),
    st.builds(OSError, st.text()),
    st.sampled_from([RuntimeError, KeyError, MemoryError, AssertionError, UnicodeError, RecursionError]).flatmap(
        lambda error: st.builds(error, st.text())
    ),
)


@given(st.lists(ERRORS, min_size=1, max_size=4))
def test_whatever_is_raised_from_whatever_is_one_line(errors: list[BaseException]) -> None:
    for error, cause in pairwise(errors):
        error.__cause__ = cause
    outcome = outcome_of(errors[0])
    assert len(str(outcome).splitlines()) == 1
    first = next((error for error in errors if isinstance(error, UserError | IncompleteRunError | OSError)), None)
    assert outcome.exit_code == (2 if isinstance(first, UserError) else 1)
