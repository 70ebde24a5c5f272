"""A robot that localizes itself and adds photos to its map as it goes.

`python examples/robot.py INDEX CAMERA [WEIGHTS]`: photos in CAMERA, in the order of their names, stand for its camera.
They lie below the folder of the index's photos, which is where photos can be added from. What the robot does not
recognise it adds, in batches, with the job `update_index`; `refresh` then takes over the new generation, and keeps
the shards that both have.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from pairvpr import Localizer

SEEN_ABOVE = 0.0
"""A pair score above this is taken for the same place; better, calibrate (`pairvpr calibrate`) and use `confidence`."""
PHOTOS_AT_ONCE = 4


def main(index: str, camera: str, weights: str | None = None) -> None:
    """Drive once through all photos."""
    localizer = Localizer.open(index, weights=weights)
    unknown: list[Path] = []
    for path in sorted(Path(camera).iterdir()):
        with Image.open(path) as image:
            frame = np.array(image.convert("RGB"))  # what a camera hands over: (H, W, 3) uint8
        best = next(iter(localizer.locate(frame, k=1)), None)
        is_known = best is not None and best.pair_score is not None and best.pair_score > SEEN_ABOVE
        print(f"{path.name}: {best.path if best and is_known else 'a new place'}")
        if not is_known:
            unknown.append(path)
        if len(unknown) == PHOTOS_AT_ONCE:
            add(index, unknown, Path(camera).parent, weights)
            localizer.refresh()
            unknown.clear()
    print(f"generation {localizer.generation}, {localizer.num_photos} photos in the map")


def add(index: str, photos: list[Path], root: Path, weights: str | None) -> None:
    """A new generation of the index that has these photos, too."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as paths:
        paths.write("".join(f"{photo.relative_to(root)}\n" for photo in photos))
        paths.flush()
        command = [sys.executable, "-m", "ray_jobs.update_index", f"index.path={index}", f"add={paths.name}"]
        network = ["model=tiny"] if weights is None else ["model=vitb", f"model.weights={weights}"]
        subprocess.run([*command, *network], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
