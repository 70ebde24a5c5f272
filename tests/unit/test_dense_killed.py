"""A store of dense features whose writer is killed at any moment and goes on has the bytes of one that was not."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pairvpr.data import storage
from pairvpr.errors import UserError
from pairvpr.retrieval.dense_store import DenseStore
from tests.support.dense import IDS, made_up
from tests.support.runs import ROOT

pytestmark = pytest.mark.slow

NUM_SEEDS = 10
CODE = "import sys; from tests.support.dense import fill_store as f; f(sys.argv[1])"


def start(directory: Path) -> subprocess.Popen[str]:
    """A writer that has said that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, str(directory)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def contents(directory: Path) -> dict[str, str]:
    """Digest of every file but what a killed writer left; those names are known."""
    files = [name for name in storage.list_files(str(directory)) if not name.endswith(".tmp")]
    return {name: storage.sha256(str(directory / name)) for name in files}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A store, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(folder)
    started_s = time.monotonic()
    process.communicate()
    assert process.returncode == 0
    return folder, time.monotonic() - started_s


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.soak) for n in range(1, NUM_SEEDS))])
def test_killed_at_a_random_moment(undisturbed: tuple[Path, float], tmp_path: Path, seed: int) -> None:
    folder, seconds = undisturbed
    process = start(tmp_path)
    time.sleep(random.Random(seed).random() * seconds)
    process.kill()
    process.communicate()
    half_done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shards/*/shard.json")}
    if not (tmp_path / "manifest.json").exists():
        with pytest.raises(UserError, match="no finished store"):
            DenseStore.open(str(tmp_path))
    again = start(tmp_path)
    again.communicate()
    assert again.returncode == 0
    assert contents(tmp_path) == contents(folder)
    assert {path: path.stat().st_mtime_ns for path in half_done} == half_done  # none was done twice
    store = DenseStore.open(str(tmp_path))
    for image_id in IDS[:: len(IDS) // 40].tolist():
        assert torch.equal(store.read(image_id), made_up(image_id).half().float())
