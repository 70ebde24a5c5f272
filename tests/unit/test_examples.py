"""Each program of `examples/`, run as it says."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pairvpr import Localizer
from pairvpr.toy import city as toy_city

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / program), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`map`, with the photos of two days below it, and an index of the first."""
    root = tmp_path_factory.mktemp("examples")
    for part, drawn in (
        ("map/first", toy_city.database_photos(seed=2, num_places=5, photos_per_place=1)),
        ("map/second", toy_city.query_photos(seed=2, num_places=5, photos_per_place=1)),
    ):
        (root / part).mkdir(parents=True)
        for photo in drawn:
            toy_city.draw(photo, width_px=160, height_px=120).save(root / part / photo.path)
    (root / "later").mkdir()
    shutil.move(root / "map" / "second", root / "later" / "second")
    Localizer.build(root / "map", root / "index", model="tiny", device="cpu")
    shutil.move(root / "later" / "second", root / "map" / "second")
    return root


def test_one_photo(folder: Path) -> None:
    photo = sorted((folder / "map" / "first").iterdir())[2]
    done = run("locate_photo.py", folder / "index", photo)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split()[1] == f"first/{photo.name}"
    assert run("locate_photo.py", folder / "index", folder / "nothing.jpg").returncode == 1
    assert run("locate_photo.py", folder / "nothing", photo).stderr.startswith("error: index ")


def test_a_folder(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "map" / "second", tmp_path / "photos")
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no photo")
    done = run("locate_folder.py", folder / "index", tmp_path / "photos", tmp_path / "out.csv")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [bool(row["match"]) for row in rows] == [Path(row["photo"]).name != "broken.jpg" for row in rows]
    assert len(rows) == 6


@pytest.mark.cluster
def test_a_robot_adds_what_it_does_not_know(folder: Path) -> None:
    done = run("robot.py", folder / "index", folder / "map" / "second")
    assert done.returncode == 0, done.stderr
    *frames, last = done.stdout.splitlines()
    num_new = sum(line.endswith("a new place") for line in frames)
    generation, num_photos = (int(word) for word in last.replace(",", "").split() if word.isdigit())
    assert generation == 1 + num_new // 4
    assert num_photos == 5 + 4 * (num_new // 4)
