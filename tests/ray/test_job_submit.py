"""The same lines under `ray job submit`, against a cluster that the tests start themselves."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from ray.job_submission import JobStatus, JobSubmissionClient

from pairvpr import status
from pairvpr.distributed import metrics
from pairvpr.training.metrics_log import read_metrics
from tests.support import training
from tests.support.runs import ROOT, arguments, wait_gone, wait_until

USED = "ray_resources", {"Name": "CPU", "State": "USED"}
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
def targets(ray_home: Path) -> Path:
    """The file in which Ray tells Prometheus where to scrape the cluster."""
    return ray_home / "jobs" / "session_latest" / "prom_metrics_service_discovery.json"


@pytest.fixture(scope="module")
def dashboard(ray_home: Path, targets: Path) -> Iterator[str]:
    """The address that jobs are submitted to."""
    port = _free_port()
    ports = [f"--port={_free_port()}", f"--dashboard-port={port}", f"--dashboard-agent-listen-port={_free_port()}"]
    options = [*ports, "--num-cpus=3", f"--temp-dir={ray_home}/jobs"]
    head = subprocess.Popen(
        [RAY, "start", "--head", "--block", "--object-store-memory=200000000", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=os.environ | {"RAY_metrics_report_interval_ms": "1000"},
    )
    address = f"http://127.0.0.1:{port}"
    wait_until(lambda: _takes_jobs(address), "the cluster's start")
    wait_until(lambda: any(name == USED[0] for name, _, _ in _samples(targets)), "the start of its metrics")
    yield address
    processes = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
    head.send_signal(signal.SIGTERM)
    head.wait(timeout=60)
    for process in processes[1:]:
        if process.is_running():
            process.terminate()
    wait_gone(processes[1:])


def _samples(targets: Path) -> Iterator[tuple[str, dict[str, str], float]]:
    """Name, labels and value of all that Prometheus would find now."""
    with suppress(OSError, ValueError):
        for address in {address for group in json.loads(targets.read_text()) for address in group["targets"]}:
            with suppress(OSError), urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
                for family in text_string_to_metric_families(answer.read().decode()):
                    for sample in family.samples:
                        yield sample.name, sample.labels, sample.value


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


@contextmanager
def _scraped(targets: Path) -> Iterator[dict[tuple[str, frozenset[tuple[str, str]]], float]]:
    """The largest value of each series of ours, and of Ray's resources, while the block runs; by name and labels."""
    series: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    is_over = threading.Event()

    def scrape() -> None:
        while not is_over.wait(0.5):
            for name, labels, value in _samples(targets):
                if "pairvpr" in name or name == USED[0]:
                    key = name, frozenset(labels.items())
                    series[key] = max(value, series.get(key, 0.0))

    scraper = threading.Thread(target=scrape)
    scraper.start()
    try:
        yield series
    finally:
        is_over.set()
        scraper.join()


def _check_metrics(series: dict[tuple[str, frozenset[tuple[str, str]]], float], city: Path) -> None:
    """Names and labels are those declared, and the counts those of the files."""
    series = {key: value for key, value in series.items() if key[0] != USED[0]}
    declared = {metric.exported: {*metric.labels, metrics.JOB} for metric in metrics.ALL}
    of_ray = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId"}
    assert series
    for name, labels in series:
        ours = {label for label, _ in labels if not label.startswith("otel_")} - of_ray
        assert ours == declared[name], name
    jobs = {dict(labels)[metrics.JOB] for _, labels in series}
    assert len(jobs) == 1
    assert "" not in jobs

    def total(metric: metrics.Declared, **wanted: str) -> float:
        return sum(
            value
            for (name, labels), value in series.items()
            if name == metric.exported and wanted.items() <= dict(labels).items()
        )

    num_photos = {kind: sum(1 for _ in (city / kind).rglob("*.jpg")) for kind in ("database", "queries")}
    for kind, number in num_photos.items():
        assert total(metrics.PHOTOS, step=f"describe {kind}") == number
        photo_bytes = sum(photo.stat().st_size for photo in (city / kind).rglob("*.jpg"))
        assert total(metrics.READ, step=f"describe {kind}") >= photo_bytes
    assert total(metrics.FAILURES, what="photo") >= 2, "the drawn city has broken photos"
    assert total(metrics.SHARDS, step="index Flat") == total(metrics.SHARDS, step="retrieve") == 2
    assert total(metrics.PAIRS, step="re-rank") > 0
    assert total(metrics.DONE, step="describe database") == total(metrics.TOTAL, step="describe database")
    assert total(metrics.RATE, step="describe database") > 0
    asked = {declared_metric.exported for declared_metric in metrics.ALL} - {name for name, _ in series}
    assert asked <= {metric.exported for metric in (metrics.CHECKPOINTS, metrics.LOSS)}, "of other jobs"


def test_evaluate(city: Path, expected: bytes, tmp_path: Path, dashboard: str, targets: Path) -> None:
    line = arguments(city, tmp_path / "out", "index.num_shards=2", "rerank.num_actors=2")
    with _scraped(targets) as series:
        submitted = _submit(dashboard, "evaluate", line)
    assert submitted.returncode == 0, submitted.stdout[-4000:] + submitted.stderr[-4000:]
    _check_metrics(series, city)
    assert "recall@N" in submitted.stdout
    assert (tmp_path / "out" / "predictions.parquet").read_bytes() == expected


@pytest.mark.soak
def test_a_job_keeps_to_its_share_of_the_cluster(
    city: Path, expected: bytes, tmp_path: Path, dashboard: str, targets: Path
) -> None:
    line = arguments(city, tmp_path / "out", "index.num_shards=1", "cluster.num_cpus=1")
    with _scraped(targets) as series:
        submitted = _submit(dashboard, "evaluate", line)
    assert submitted.returncode == 0, submitted.stdout[-4000:] + submitted.stderr[-4000:]
    assert (tmp_path / "out" / "predictions.parquet").read_bytes() == expected
    used = [
        cpus for (name, labels), cpus in series.items() if name == USED[0] and USED[1].items() <= dict(labels).items()
    ]
    assert 0 < max(used) <= 1


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


@pytest.mark.soak
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
