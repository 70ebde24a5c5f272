"""The job plan as a user runs it: measured on a Ray of its own, or from given numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import SMALL_NETWORK, run_job


def printed(out: str) -> dict[str, Any]:
    """The JSON behind the table."""
    return json.loads(out[out.index("\n{\n") :])


@pytest.mark.soak
def test_a_plan_with_calibration(tmp_path: Path) -> None:
    line = [
        "plan.num_images=1000000",
        *SMALL_NETWORK,
        "plan.calibration_photos=16",
        "describe.batch_size=4",
        "describe.num_threads_per_actor=1",
        "cluster.num_cpus=2",
        f"output={tmp_path}/plan.json",
    ]
    done = run_job("plan", line)
    assert done.returncode == 0, done.stderr
    content = printed(done.stdout)
    assert json.loads((tmp_path / "plan.json").read_text()) == content
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    measured = content["calibration"]
    assert (measured["num_photos"], content["num_images"]) == (16, 1_000_000)
    assert 0 < measured["num_timed"] <= 16
    assert measured["seconds"] > 0
    speed = measured["num_timed"] / measured["seconds"]
    assert abs(content["images_per_s"] / speed - 1) < 1e-9
    assert abs(content["hours"] * 3600 * speed / 1_000_000 - 1) < 1e-9
    (node,) = content["nodes"]
    assert node["num_cpus"] == 2
    assert abs(content["budget_bytes"] - node["memory_bytes"] / 2) < 2
    assert content["descriptors_bytes"] == 1_000_000 * 128 * 4
    assert "hours at" in done.stdout
    assert "measured: 16 drawn photos of 640 x 480" in done.stdout


def test_a_plan_that_says_what_is_wrong_in_one_line() -> None:
    done = run_job("plan", ["plan.num_images=5", "benchmark=toy_city"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: benchmark=... and plan.num_images=...: both are given; expected one")
    assert len(done.stderr.strip().splitlines()) == 1
