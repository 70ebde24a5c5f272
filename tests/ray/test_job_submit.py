"""The same lines under `ray job submit`, against a cluster that the tests start themselves."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from ray.job_submission import JobStatus, JobSubmissionClient

from pairvpr import status
from pairvpr.training.metrics_log import read_metrics
from tests.support import training
from tests.support.runs import ROOT, arguments, wait_gone, wait_until

RAY = str(Path(sys.executable).with_name("ray"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _takes_jobs(address: str) -> bool:
    """The dashboard answers some time before the agent that starts jobs is there."""
    try:
        JobSubmissionClient(address).submit_job(entrypoint="true")
    except (ConnectionError, RuntimeError):
        return False
    return True


@pytest.fixture(scope="module")
def dashboard(ray_home: Path) -> Iterator[str]:
    """The address that jobs are submitted to."""
    port = _free_port()
    ports = [f"--port={_free_port()}", f"--dashboard-port={port}", f"--dashboard-agent-listen-port={_free_port()}"]
    options = [*ports, "--num-cpus=3", f"--temp-dir={ray_home}"]
    head = subprocess.Popen(
        [RAY, "start", "--head", "--block", "--object-store-memory=200000000", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    wait_until(lambda: _takes_jobs(address), "the cluster's start")
    yield address
    processes = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
    head.send_signal(signal.SIGTERM)
    head.wait(timeout=60)
    for process in processes[1:]:
        if process.is_running():
            process.terminate()
    wait_gone(processes[1:])


def _submit(dashboard: str, job: str, line: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(RAY, "job", "submit", "--address", dashboard, "--working-dir", ".", "--"),
            *(sys.executable, "-m", f"ray_jobs.{job}", *line),
        ],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": ""},
        capture_output=True,
        text=True,
        timeout=400,
    )


def test_evaluate(city: Path, expected: bytes, tmp_path: Path, dashboard: str) -> None:
    line = arguments(city, tmp_path / "out", "index.num_shards=2", "rerank.num_actors=2")
    submitted = _submit(dashboard, "evaluate", line)
    assert submitted.returncode == 0, submitted.stdout[-4000:] + submitted.stderr[-4000:]
    assert "recall@N" in submitted.stdout
    assert (tmp_path / "out" / "predictions.parquet").read_bytes() == expected


@pytest.mark.soak
def test_a_job_that_nobody_waits_for_is_watched_killed_and_started_again(
    city: Path, expected: bytes, tmp_path: Path, dashboard: str
) -> None:
    """As Kubernetes would: whenever its entry point ends with a failure, the same line is submitted again."""
    output = str(tmp_path / "out")
    entry = shlex.join([sys.executable, "-m", "ray_jobs.evaluate", *arguments(city, output, "rerank.num_actors=1")])
    client = JobSubmissionClient(dashboard)
    kills = 0
    for _ in range(4):
        job = client.submit_job(entrypoint=entry, runtime_env={"working_dir": str(ROOT), "excludes": [".venv", ".git"]})
        while not client.get_job_status(job).is_terminal():
            found = status.read(output)
            is_scoring = any(Path(output).glob("reranked/*.parquet")) or kills == 0
            if kills < 2 and found is not None and found.state is status.State.running and found.lines and is_scoring:
                with suppress(ProcessLookupError):
                    os.kill(found.process, signal.SIGKILL)
                    kills += 1
            time.sleep(0.2)
        if client.get_job_status(job) is JobStatus.SUCCEEDED:
            break
    assert kills == 2
    assert status.about(output)[0].startswith("evaluate: finished at ")
    assert (tmp_path / "out" / "predictions.parquet").read_bytes() == expected


def test_train(tmp_path: Path, dashboard: str) -> None:
    training.draw_training_set(tmp_path)
    here, there = (training.arguments(2, tmp_path, tmp_path / name, "train.max_steps=2") for name in ("here", "there"))
    submitted = _submit(dashboard, "train_stage_two", there)
    assert submitted.returncode == 0, submitted.stdout[-4000:] + submitted.stderr[-4000:]
    num_threads = torch.get_num_threads()
    rows = training.train_here(2, here)
    torch.set_num_threads(num_threads)
    assert training.losses(read_metrics(str(tmp_path / "there"))) == training.losses(rows)
    assert len(rows) == 2
