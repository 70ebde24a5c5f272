"""Training under Ray Train: a worker and then the driver killed, and the losses of two ranks without Ray."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from pairvpr.training.metrics_log import read_metrics
from tests.support.runs import descendants, run_job, start_job, wait_gone, wait_until
from tests.support.training import JOBS, STAGES, arguments, draw_training_set, losses, train_on_ranks

NUM_STEPS = 10


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos to train on."""
    folder = tmp_path_factory.mktemp("training")
    draw_training_set(folder)
    return folder


def _line(stage: int, root: Path, output: Path, *more: str) -> list[str]:
    return arguments(
        stage, root, output, "train.num_workers=2", "train.checkpoint_every_steps=1", "cluster.num_cpus=2", *more
    )


@pytest.mark.parametrize("stage", STAGES)
def test_worker_and_driver_killed(root: Path, tmp_path: Path, stage: int) -> None:
    train_on_ranks(stage, _line(stage, root, tmp_path / "undisturbed"), 2, tmp_path)
    expected = read_metrics(str(tmp_path / "undisturbed"))
    assert [row["step"] for row in expected] == list(range(1, NUM_STEPS + 1))

    output, line = str(tmp_path / "out"), _line(stage, root, tmp_path / "out")
    driver = start_job(JOBS[stage], line)
    wait_until(lambda: len(read_metrics(output)) >= 2, "the second step")
    before = _workers(driver.pid)
    assert len(before) == 2
    before[1].kill()
    done = len(read_metrics(output))
    wait_until(lambda: len(read_metrics(output)) > done + 1, "going on without a killed worker")
    assert not set(before) & set(_workers(driver.pid))  # all workers are new
    children = descendants(driver.pid)
    driver.kill()
    driver.communicate()
    assert len(read_metrics(output)) < NUM_STEPS

    again = run_job(JOBS[stage], line)
    assert again.returncode == 0, again.stderr
    assert losses(read_metrics(output)) == losses(expected)
    third = run_job(JOBS[stage], line)
    assert third.returncode == 0, third.stderr
    assert "finished earlier" in third.stderr
    wait_gone(children)


def _workers(pid: int) -> list[psutil.Process]:
    return [child for child in descendants(pid) if "RayTrainWorker" in _title(child)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


@pytest.mark.soak
def test_what_a_worker_can_not_mend_is_said_once(root: Path, tmp_path: Path) -> None:
    line = arguments(2, root, tmp_path / "out", "train.lr=1e30", "cluster.num_cpus=2", "train.validation=toy_city")
    stopped = run_job("train_stage_two", [*line, "train.validation.num_places=3"])
    assert stopped.returncode == 2
    assert "is not a number" in stopped.stderr or "not finite" in stopped.stderr
    assert "Traceback" not in stopped.stderr
