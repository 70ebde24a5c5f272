"""What keeps a Ray of its own from starting is one line that names the variable or the limit, and soon."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.boundary import ended, mounted, the_line

START = (
    "from pairvpr.distributed.runtime import ray_session",
    "from pairvpr.config.schema import ClusterConfig",
    "with ray_session(ClusterConfig(num_cpus=1)): pass",
)


def test_a_temporary_folder_too_long_for_sockets(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 90)
    folder.mkdir()
    code, _, error = ended(*START, env={"RAY_TMPDIR": str(folder)})
    assert code == 1
    the_line(error, "Ray can't start on this machine: ", "AF_UNIX path length", "short path", f"RAY_TMPDIR={folder}")


def test_a_temporary_folder_without_space(tmp_path: Path) -> None:
    shell = mounted(f"mount -t tmpfs -o size=1m tmpfs {tmp_path}")
    code, _, error = ended(*START, shell=shell, env={"RAY_TMPDIR": str(tmp_path)})
    assert code == 2
    the_line(
        error,
        f"error: RAY_TMPDIR={tmp_path}: Ray keeps its files there, but the disk has only 1 MiB free; expected 64 MiB",
    )


@pytest.mark.soak
def test_too_few_files() -> None:
    code, _, error = ended(*START, shell='ulimit -n 100; "$@"')
    assert code == 2
    the_line(error, "Ray needs 256 open files, but this process may open only 100; expected `ulimit -n 65536`")


@pytest.mark.soak
def test_no_network() -> None:
    probe = ["unshare", "-n", "true"]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("namespaces are not allowed here")
    code, _, error = ended(*START, shell='exec unshare -n "$@"')
    assert code == 2
    the_line(
        error, "Ray's processes communicate over 127.0.0.1, which does not work: ", "a loopback interface that is up"
    )


@pytest.mark.soak
def test_too_little_shared_memory_is_said() -> None:
    """Ray goes on with its object store on the disk."""
    code, _, error = ended(*START, shell=mounted("mount -t tmpfs -o size=64m tmpfs /dev/shm"))
    assert code == 0
    the_line(error, "Ray: /dev/shm has 64 MiB and the object store wants ", "which is slower", "--shm-size")
