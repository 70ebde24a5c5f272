"""deploy/slurm/pairvpr.sbatch, run by bash with stubs for srun and scontrol, and Ray's own symmetric-run.

symmetric-run ends with `ray stop`, which ends every Ray that it sees. So the script gets a process namespace of its
own, as a node that SLURM gives away exclusively has its own processes.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.runs import ROOT, arguments, wait_until

SCRIPT = ROOT / "deploy" / "slurm" / "pairvpr.sbatch"
SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/sh
case "$1" in
show) echo node1 ;;
requeue)
    [ -z "$REFUSES" ] || { echo "slurm_requeue error: Requested operation is presently disabled" >&2; exit 1; }
    echo "$2" >> "$REQUEUED"
    trap "" TERM
    kill -TERM 0 ;; # SLURM ends the job's processes
esac
"""
HOSTNAME = """#!/bin/sh
echo 127.0.0.1
"""
PAIRVPR = f"""#!/bin/sh
exec {sys.executable} -c 'import sys; from pairvpr.cli import main; sys.exit(main())' "$@"
"""
ALONE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "setsid"]


@pytest.fixture
def node(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch script on the one node of an allocation."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "hostname": HOSTNAME, "pairvpr": PAIRVPR}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    path = os.pathsep.join((str(commands), str(Path(sys.executable).parent), "/usr/bin", "/bin"))
    kept = {name: os.environ[name] for name in ("HOME", "PYTHONPATH") if name in os.environ}
    return kept | {
        "PATH": path,
        "REQUEUED": str(tmp_path / "requeued"),
        "SLURM_JOB_ID": str(1000 + os.getpid() % 9000),
        "SLURM_JOB_NODELIST": "node[1-1]",
        "SLURM_NNODES": "1",
        "SLURM_CPUS_PER_TASK": "3",
        "OMP_NUM_THREADS": "1",
    }


def test_shellcheck_has_nothing_to_say() -> None:
    command = [str(Path(sys.executable).with_name("shellcheck")), str(SCRIPT)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    ("words", "path", "line"),
    [
        ([], None, "error: no job; expected sbatch pairvpr.sbatch JOB key=value ..., see pairvpr --help"),
        (["evaluate"], "/usr/bin:/bin", "error: no command pairvpr; expected an activated environment: "),
    ],
)
def test_mistakes_are_one_line(node: dict[str, str], words: list[str], path: str | None, line: str) -> None:
    environment = node if path is None else node | {"PATH": path}
    ended = subprocess.run(["bash", SCRIPT, *words], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith(line)
    assert ended.stderr.count("\n") == 1


def _run_with_ray(node: dict[str, str], tmp_path: Path, *lines: str) -> subprocess.CompletedProcess[str]:
    """The script, whose command `ray` is these lines of shell. Their parent is the script."""
    stub = tmp_path / "bin" / "ray"
    stub.write_text("\n".join(["#!/bin/sh", *lines]))
    stub.chmod(0o755)
    ended = subprocess.run(["bash", SCRIPT, "plan"], env=node, capture_output=True, text=True, check=False, timeout=60)
    shutil.rmtree(f"/tmp/pv{node['SLURM_JOB_ID']}", ignore_errors=True)
    return ended


def test_a_ray_that_does_not_start_is_no_success(node: dict[str, str], tmp_path: Path) -> None:
    """symmetric-run itself ends with 0 then."""
    ended = _run_with_ray(node, tmp_path, "echo Failed to start Ray >&2")
    assert ended.returncode == 1
    assert "incomplete: no node ran the job" in ended.stderr


def test_steps_get_the_cpus_of_the_job(node: dict[str, str], tmp_path: Path) -> None:
    ended = _run_with_ray(node, tmp_path, 'echo "CPUs of a step: $SRUN_CPUS_PER_TASK"')
    assert "CPUs of a step: 3\n" in ended.stdout


@pytest.mark.parametrize(("leaves", "code"), [('echo 0 > "$TMPDIR/exit-code"', 0), ("", 1)])
def test_a_job_that_slurm_does_not_queue_again_says_so(
    node: dict[str, str], tmp_path: Path, leaves: str, code: int
) -> None:
    """It uses the time that is left, and succeeds only if it is done then."""
    ended = _run_with_ray(node | {"REFUSES": "yes"}, tmp_path, "kill -USR1 $PPID", "sleep 1", leaves)
    assert "incomplete: SLURM does not queue this job again" in ended.stderr
    assert "submit the same line again to continue\n" in ended.stderr
    assert ended.returncode == code


@pytest.mark.soak
def test_a_job_near_its_time_limit_queues_itself_again_and_goes_on(
    city: Path, expected_one_by_one: bytes, tmp_path: Path, node: dict[str, str]
) -> None:
    if shutil.which("unshare") is None or subprocess.run([*ALONE, "true"], check=False).returncode:
        pytest.skip("no namespace of processes is allowed here")
    output = tmp_path / "out"
    line = arguments(city, output, "rerank.num_actors=1", "rerank.queries_per_unit=1")

    def started() -> subprocess.Popen[str]:
        command = [*ALONE, "bash", str(SCRIPT), "evaluate", *line]
        return subprocess.Popen(command, env=node, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    first = started()
    wait_until(lambda: any(output.glob("reranked/*.parquet")), "the first answers")
    (script,) = psutil.Process(first.pid).children()
    script.send_signal(signal.SIGUSR1)
    said, _ = first.communicate(timeout=200)
    assert Path(node["REQUEUED"]).read_text().split() == [node["SLURM_JOB_ID"]], said
    assert "no node ran the job" not in said
    assert first.returncode == 1
    assert not (output / "predictions.parquet").exists()

    second = started()
    said, _ = second.communicate(timeout=400)
    assert second.returncode == 0, said
    assert "kept from an earlier run" in said
    assert (output / "predictions.parquet").read_bytes() == expected_one_by_one
    assert not Path(f"/tmp/pv{node['SLURM_JOB_ID']}").exists(), "scratch is cleared"
