"""kill -9 of the driver or of an actor, photos that vanish: no result is lost, doubled or invented."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from pairvpr import status
from tests.support.runs import (
    actors,
    arguments,
    kill_when,
    run_job,
    single_machine_predictions,
    start_job,
    wait_gone,
    wait_until,
)

MOMENTS = {
    "while describing": "index/parts/*.npz",
    "when the index is finished": "index/manifest.json",
    "while re-ranking": "reranked/000001.parquet",
}


def kill_driver(line: Sequence[str], output: Path, moment: str) -> list[psutil.Process]:
    """Start a run and kill its driver at a moment; gives the processes that it started."""
    driver = start_job("evaluate", line)
    children = kill_when(driver, lambda: any(output.glob(MOMENTS[moment])), moment)
    assert not (output / "predictions.parquet").exists()
    killed = status.read(str(output))
    assert killed is not None
    assert (killed.job, killed.state, killed.process) == ("evaluate", status.State.running, driver.pid)
    return children


def go_on(line: Sequence[str], output: Path, expected: bytes) -> None:
    """The same line again: what was done is not done twice, and the predictions are those of an undisturbed run."""
    survivors = {file: file.stat().st_mtime_ns for file in output.glob("reranked/*.parquet")}
    again = run_job("evaluate", line)
    assert again.returncode == 0, again.stderr
    assert (output / "predictions.parquet").read_bytes() == expected
    assert all(file.stat().st_mtime_ns == written for file, written in survivors.items())
    assert not list(output.rglob("*.tmp"))
    assert status.about(str(output))[0].startswith("evaluate: finished at ")


def test_a_query_that_changed_while_the_driver_is_dead_is_named_and_put_back_gives_the_same(
    city: Path, expected: bytes, tmp_path: Path
) -> None:
    """The driver is killed while it re-ranks; with the photo back, the same line goes on from there."""
    own = tmp_path / "city"
    shutil.copytree(city, own)
    line = arguments(own, tmp_path / "out", "index.num_shards=2", "rerank.num_actors=1")
    children = kill_driver(line, tmp_path / "out", "while re-ranking")
    victim = sorted((own / "queries").iterdir())[2]
    hidden = victim.rename(tmp_path / victim.name)
    victim.write_bytes(b"")
    broken = run_job("evaluate", line)
    assert broken.returncode != 0
    assert "Traceback" not in broken.stderr
    assert f"1 of 13 photos have changed since they were described in {tmp_path / 'out' / 'queries'}" in broken.stderr
    assert victim.name in broken.stderr
    assert not (tmp_path / "out" / "predictions.parquet").exists()

    hidden.replace(victim)
    go_on(line, tmp_path / "out", expected)
    third = run_job("evaluate", line)
    assert third.returncode == 0, third.stderr
    assert third.stderr.count("finished earlier, skipped") == 3, third.stderr  # index, queries, retrieval
    wait_gone(children)


@pytest.mark.soak
@pytest.mark.parametrize("moment", MOMENTS)
def test_driver_killed_and_run_again(city: Path, expected: bytes, tmp_path: Path, moment: str) -> None:
    line = arguments(city, tmp_path / "out", "index.num_shards=2", "rerank.num_actors=1")
    children = kill_driver(line, tmp_path / "out", moment)
    go_on(line, tmp_path / "out", expected)
    wait_gone(children)


def test_reranking_actor_killed(city: Path, expected_one_by_one: bytes, tmp_path: Path) -> None:
    """It stands still, so its unit is never done. One that was not ready yet had none: then another run is tried."""
    for attempt in range(5):
        output = tmp_path / f"out_{attempt}"
        line = arguments(city, output, "rerank.num_actors=2", "rerank.queries_per_unit=1")
        driver = start_job("evaluate", line)
        wait_until(lambda pid=driver.pid: len(actors(pid, "_RerankActor")) == 2, "the start of two actors")
        victim = actors(driver.pid, "_RerankActor")[0]
        wait_until(lambda output=output: any(output.glob("reranked/*.parquet")), "the first unit", job=driver)
        with suppress(psutil.NoSuchProcess):  # the run is over
            victim.suspend()
            wait_until(lambda output=output: len(list(output.glob("reranked/*.parquet"))) > 3, "units of the other one")
            victim.kill()
        out, err = driver.communicate(timeout=300)
        assert driver.returncode == 0, err
        assert "recall@N" in out
        assert (output / "predictions.parquet").read_bytes() == expected_one_by_one
        if "an actor died" in err:
            return
    pytest.fail("no actor was killed while it had work")


@pytest.mark.soak
def test_a_photo_that_is_replaced_while_the_driver_is_dead_is_described_anew(city: Path, tmp_path: Path) -> None:
    own = tmp_path / "city"
    shutil.copytree(city, own)
    line = arguments(own, tmp_path / "out", "index.num_shards=2", "rerank.num_actors=1")
    driver = start_job("evaluate", line)
    children = kill_when(driver, lambda: any((tmp_path / "out").glob("index/parts/*.npz")), "a described part")
    first, *_, other = sorted((own / "database").iterdir())
    first.write_bytes(other.read_bytes())
    again = run_job("evaluate", line)
    assert again.returncode == 0, again.stderr
    assert f"1 photos have changed since ({first.name} first); they are described again" in again.stderr
    expected = single_machine_predictions(arguments(own, tmp_path / "unused"), tmp_path / "expected.parquet")
    assert (tmp_path / "out" / "predictions.parquet").read_bytes() == expected
    wait_gone(children)
