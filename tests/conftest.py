"""Settings of every test: hypothesis draws the same examples each time; nothing is kept on disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.configuration import set_hypothesis_home_dir

HYPOTHESIS_HOME = Path(tempfile.mkdtemp(prefix="pairvpr-hypothesis-"))

set_hypothesis_home_dir(HYPOTHESIS_HOME)
settings.register_profile(
    "pairvpr",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("pairvpr")


def pytest_unconfigure() -> None:
    """Hypothesis keeps tables of characters on disk, whatever its settings say."""
    shutil.rmtree(HYPOTHESIS_HOME, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def ray_home() -> Iterator[Path]:
    """A folder for Ray's sessions and cached weights, removed after the tests. Sockets' names hold its short path."""
    folder = Path(tempfile.mkdtemp(prefix="pv", dir="/tmp"))
    os.environ |= {"RAY_TMPDIR": str(folder), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
