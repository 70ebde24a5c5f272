"""Photos that say in their EXIF where they were taken."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.ExifTags import GPS, IFD


def draw_located(folder: Path, longitudes: Mapping[str, float], latitude: float) -> None:
    """Photos of noise by name, at degrees north and east."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, longitude in longitudes.items():
        exif = Image.Exif()
        exif.get_ifd(IFD.GPSInfo).update(
            {
                GPS.GPSLatitudeRef: "N",
                GPS.GPSLatitude: (latitude // 1, latitude % 1 * 60.0, 0.0),
                GPS.GPSLongitudeRef: "E",
                GPS.GPSLongitude: (longitude // 1, longitude % 1 * 60.0, 0.0),
            }
        )
        pixels = np.random.default_rng(ord(name[0])).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name, exif=exif)
