"""Training under Ray Train: its actors and then the driver killed, and the losses of two ranks without Ray."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from pairvpr import status
from pairvpr.training.metrics_log import read_metrics
from tests.support.runs import actors, kill_when, run_job, start_job, wait_gone, wait_until
from tests.support.terminal import in_a_terminal, without_codes
from tests.support.training import JOBS, arguments, draw_training_set, losses, train_on_ranks

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


@pytest.mark.parametrize(
    ("stage", "victims"),
    [
        (1, ("RayTrainWorker", "_Lines")),
        pytest.param(2, ("TrainController",), marks=pytest.mark.soak),
    ],
)
def test_actors_and_driver_killed(root: Path, tmp_path: Path, stage: int, victims: tuple[str, ...]) -> None:
    train_on_ranks(stage, _line(stage, root, tmp_path / "undisturbed"), 2, tmp_path)
    expected = read_metrics(str(tmp_path / "undisturbed"))
    assert [row["step"] for row in expected] == list(range(1, NUM_STEPS + 1))

    output, line = str(tmp_path / "out"), _line(stage, root, tmp_path / "out")
    driver = start_job(JOBS[stage], line)
    wait_until(lambda: len(read_metrics(output)) >= 2, "the second step", job=driver)
    before = actors(driver.pid, "RayTrainWorker")
    assert len(before) == 2
    for name in victims:
        actors(driver.pid, name)[-1].kill()
    done = len(read_metrics(output))
    wait_until(lambda: len(read_metrics(output)) > done + 1, "going on without a killed actor")
    # All workers are new.
    children = kill_when(driver, lambda: not any(worker.is_running() for worker in before), "the end of the workers")
    assert len(read_metrics(output)) < NUM_STEPS

    again = run_job(JOBS[stage], line)
    assert again.returncode == 0, again.stderr
    assert losses(read_metrics(output)) == losses(expected)
    text, is_well = status.about(output)
    assert is_well
    assert text.startswith("training: finished at ")
    assert f"step {NUM_STEPS} of {NUM_STEPS}, loss " in text or "finished earlier" in text
    third = run_job(JOBS[stage], line)
    assert third.returncode == 0, third.stderr
    assert "finished earlier" in third.stderr
    wait_gone(children)


@pytest.mark.soak
def test_a_terminal_shows_the_steps(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ray_jobs.train_stage_one", *_line(1, root, tmp_path / "out")]
    written = without_codes(in_a_terminal(command)[0])
    assert re.search(rf"train stage 1 .* {NUM_STEPS}/{NUM_STEPS} steps, \d+\.\d/s, left", written)
    assert f"step {NUM_STEPS} of {NUM_STEPS}, loss " in written, "a bar does not say the loss"


@pytest.mark.soak
def test_starts_in_vain_end(root: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    (tmp_path / "out" / "metrics.jsonl").mkdir()  # no worker can publish the log, so none gets to a checkpoint
    stopped = run_job("train_stage_one", _line(1, root, tmp_path / "out"))
    assert stopped.returncode == 1, stopped.stderr
    assert "training stopped after step 0 of 10: a worker failed: IsADirectoryError" in stopped.stderr
    assert stopped.stderr.count("restarting after step 0") == 4
    assert "Traceback" not in stopped.stderr


@pytest.mark.soak
def test_what_a_worker_can_not_mend_is_said_once(root: Path, tmp_path: Path) -> None:
    line = arguments(2, root, tmp_path / "out", "train.lr=1e30", "cluster.num_cpus=2", "train.validation=toy_city")
    stopped = run_job("train_stage_two", [*line, "train.validation.num_places=3"])
    assert stopped.returncode == 2
    assert "is not a number" in stopped.stderr or "not finite" in stopped.stderr
    assert "Traceback" not in stopped.stderr
