"""A robot that looks up where it is, and adds the photos that it takes to its map.

    python examples/robot_loop.py MAP_PHOTOS CAMERA INDEX MODEL

The names of the photos in the folder MAP_PHOTOS say where they were taken. The folder CAMERA stands for the robot's
camera: its photos are taken one after another. Each round looks up some of them and then adds them to the map.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from pairvpr import Localizer
from pairvpr.cli import run_job

PHOTOS_A_ROUND = 20
"""Adding starts Ray, so it is done for some photos at a time."""


def main(map_photos: str, camera: str, index: str, model: str) -> None:
    localizer = Localizer.build(map_photos, index, model=model, positions="names")
    photos = sorted(Path(camera).glob("*.jpg"))
    for first in range(0, len(photos), PHOTOS_A_ROUND):
        seen = photos[first : first + PHOTOS_A_ROUND]
        for photo in seen:
            best = localizer.locate(photo, k=1)[0]
            print(f"{photo.name}\t{best.path}\t{best.pair_score:.2f}")
        add(seen, Path(map_photos), index, model)
        localizer.refresh()  # from now on the new photos are found, too
        print(f"generation {localizer.generation}: {localizer.num_photos} photos")


def add(photos: list[Path], map_photos: Path, index: str, model: str) -> None:
    """Copy `photos` to the map's folder, and make a generation of the index that has them."""
    for photo in photos:
        shutil.copy(photo, map_photos)
    added = Path(index).with_suffix(".added.txt")
    added.write_text("\n".join(photo.name for photo in photos))
    line = [f"index.path={index}", f"add={added}", f"model={model}", "positions=names"]
    if run_job("update_index", line) != 0:
        raise SystemExit("the index was not changed")


if __name__ == "__main__":
    main(*sys.argv[1:])
