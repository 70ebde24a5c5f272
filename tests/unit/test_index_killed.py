"""A builder that is killed at any moment and started again leaves the bytes of one that was not."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pairvpr.data import storage
from pairvpr.data.manifest import Manifest
from pairvpr.index.generations import read_manifest
from pairvpr.index.reader import search_index
from tests.support.index import describe_rows, opened
from tests.support.runs import ROOT

NUM_SEEDS_OF_A_KIND = 10
KINDS = ("flat", "ivf_rabitq")
ROWS = np.random.default_rng(0).standard_normal((4000, 32)).astype(np.float32)
CODE = "import sys; from tests.support.index import build_described as b; b(sys.argv[1], sys.argv[2])"


def start(directory: Path, kind: str) -> subprocess.Popen[str]:
    """A builder that has said that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, str(directory), kind], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def contents(directory: Path) -> dict[str, str]:
    """Digest of every file but what a killed writer left; those names are known."""
    files = [name for name in storage.list_files(str(directory)) if not name.endswith(".tmp")]
    return {name: storage.sha256(str(directory / name)) for name in files}


@pytest.fixture(scope="module", params=KINDS)
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, float]:
    """A description, the index made of it beside it, its kind, and the seconds that took."""
    folder, kind = tmp_path_factory.mktemp("killed"), str(request.param)
    images = Manifest.of("/photos", [f"{number:04d}.jpg" for number in range(len(ROWS))])
    describe_rows(str(folder / "described"), images, ROWS, [700, 1500, 1500, 3000])
    shutil.copytree(folder / "described", folder / "whole")
    process = start(folder / "whole", kind)
    started_s = time.monotonic()
    process.communicate()
    assert process.returncode == 0
    return folder, kind, time.monotonic() - started_s


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.soak) for n in range(1, NUM_SEEDS_OF_A_KIND))])
def test_killed_at_a_random_moment(undisturbed: tuple[Path, str, float], tmp_path: Path, seed: int) -> None:
    folder, kind, seconds = undisturbed
    index = tmp_path / "index"
    shutil.copytree(folder / "described", index)
    process = start(index, kind)
    time.sleep(random.Random(seed).random() * seconds)
    process.kill()
    process.communicate()
    again = start(index, kind)
    again.communicate()
    assert again.returncode == 0
    assert contents(index) == contents(folder / "whole")
    manifest = read_manifest(str(index))
    assert manifest is not None
    _, found = search_index(opened(str(index), manifest), ROWS[:50], 1, num_threads=1)
    assert found[:, 0].tolist() == list(range(50))
