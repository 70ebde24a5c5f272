"""`make soak`: the driver is killed at random moments, many times, until a run gets through."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.support.runs import arguments, run_job, start_job

NUM_SEEDS = 20


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_driver_killed_at_random_moments(city: Path, expected: bytes, tmp_path: Path, seed: int) -> None:
    randomness = random.Random(seed)
    line = arguments(city, tmp_path / "out", f"index.num_shards={randomness.randint(1, 5)}", "rerank.num_actors=2")
    for _ in range(3):
        driver = start_job("evaluate", line)
        time.sleep(randomness.uniform(6, 25))
        driver.kill()
        driver.communicate()
    last = run_job("evaluate", line)
    assert last.returncode == 0, last.stderr
    assert (tmp_path / "out" / "predictions.parquet").read_bytes() == expected
