"""The programs of `examples/` on a drawn city; each line that they print is about the right place."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from pairvpr import Localizer
from pairvpr.toy import city
from tests.support.runs import ROOT

NUM_PLACES = 3


def run(example: str, *arguments: Path | str) -> None:
    runpy.run_path(str(ROOT / "examples" / f"{example}.py"))["main"](*map(str, arguments))


def places(text: str) -> list[str]:
    """Numbers of the places that names of drawn photos carry, in order."""
    return re.findall(r"s\d+p(\d+)d", text)


@pytest.mark.usefixtures("local_ray")
def test_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One index, made by the first, asked by the second, added to by the third."""
    database, queries, index = (tmp_path / name for name in ("database", "queries", "index"))
    for folder, photos in (
        (database, city.database_photos(seed=3, num_places=NUM_PLACES, photos_per_place=2)),
        (queries, city.query_photos(seed=3, num_places=NUM_PLACES)),
    ):
        folder.mkdir()
        for photo in photos:
            city.draw(photo, width_px=96, height_px=72).save(folder / photo.path, quality=85)
    (queries / "z_broken.jpg").write_bytes(b"no photo")
    first, *_, broken = sorted(queries.iterdir())

    run("locate_folder", database, queries, index, "tiny")
    *found, last = capsys.readouterr().out.splitlines()
    assert len(found) == NUM_PLACES
    assert all(len(set(places(line))) == 1 for line in found)
    assert last.startswith("z_broken.jpg\t")

    run("locate_photo", index, first)
    assert places(capsys.readouterr().out.splitlines()[0]) == places(first.name)

    broken.unlink()
    run("robot_loop", database, queries, index, "tiny")
    *found, last = capsys.readouterr().out.splitlines()
    assert [places(line)[0] for line in found if "\t" in line] == places(" ".join(sorted(map(str, queries.iterdir()))))
    assert last == f"generation 2: {3 * NUM_PLACES} photos"
    (match,) = Localizer.open(index).locate(first, k=1)
    assert match.path == first.name
