"""Would another JPEG decoder than Pillow's feed a network faster? simplejpeg beside it, whole and scaled.

    pip install simplejpeg
    python -m benchmarks.jpeg_decoders --report

JPEG photos of a toy city in three sizes become pixels of 322 x 322. One thread, whose processor time counts; rounds
alternate. Either decoder's pixels are resized by Pillow, so that only decoding differs. `images.decode` also checks the
file and cuts its metadata, which any decoder would need. PyTurboJPEG calls the same library, from the system.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import simplejpeg  # pyright: ignore[reportMissingImports]
from numpy.typing import NDArray
from PIL import Image, features

from benchmarks import shared
from pairvpr.data import images
from pairvpr.toy import city as toy_city

WHAT = "jpeg_decoders"
SIZES = ((640, 480), (1600, 1200), (3264, 2448))
SIDE_PX = 322
LEAST_PX = images.SCALED_SIDES * SIDE_PX


def resized(image: Image.Image) -> NDArray[np.uint8]:
    """As `images.decode` resizes."""
    return np.asarray(image.resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR, reducing_gap=None))


def by_pillow(data: bytes) -> NDArray[np.uint8]:
    """Opened and decoded by Pillow, without the project's checks."""
    with Image.open(io.BytesIO(data)) as image:
        return resized(image.convert("RGB"))


def by_simplejpeg(data: bytes, least_px: int = 0, *, rough: bool = False) -> NDArray[np.uint8]:
    """At the smallest scale that leaves both sides `least_px` (0 = whole); `rough` is faster and less exact."""
    pixels = simplejpeg.decode_jpeg(
        data, min_height=least_px, min_width=least_px, min_factor=1, fastdct=rough, fastupsample=rough
    )
    return resized(Image.fromarray(pixels))


WAYS: dict[str, Callable[[bytes], NDArray[np.uint8]]] = {
    "images.decode": lambda data: images.decode(data, SIDE_PX),
    "Pillow": by_pillow,
    "simplejpeg": by_simplejpeg,
    "simplejpeg, rough": lambda data: by_simplejpeg(data, rough=True),
    "images.decode, scaled": lambda data: images.decode(data, SIDE_PX, scaled_decoding=True),
    "simplejpeg, scaled": lambda data: by_simplejpeg(data, LEAST_PX),
    "simplejpeg, scaled, rough": lambda data: by_simplejpeg(data, LEAST_PX, rough=True),
}


def photos(size: tuple[int, int], number: int) -> list[bytes]:
    """JPEGs of a toy city, quality 90."""
    found = []
    for photo in toy_city.database_photos(seed=5, num_places=number)[:number]:
        sink = io.BytesIO()
        toy_city.draw(photo, width_px=size[0], height_px=size[1]).save(sink, "JPEG", quality=90)
        found.append(sink.getvalue())
    return found


def main() -> None:
    """All sizes and ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=12, help="photos of a size (12)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds (7)")
    shared.add_report_option(parser, WHAT)
    options, load_at_start = parser.parse_args(), os.getloadavg()[0]
    rows = []
    for size in SIZES:
        drawn = photos(size, options.photos)
        seconds: dict[str, list[float]] = {name: [] for name in WAYS}
        pixels: dict[str, list[NDArray[np.uint8]]] = {}
        for _ in range(options.rounds):
            for name, way in WAYS.items():
                start_s = time.process_time()
                pixels[name] = [way(data) for data in drawn]
                seconds[name].append(time.process_time() - start_s)
        whole = np.stack(pixels["images.decode"]).astype(np.int64)
        base_s = statistics.median(seconds["images.decode"])
        for name, its in seconds.items():
            median_s = statistics.median(its)
            apart = np.abs(np.stack(pixels[name]) - whole)
            rate = f"{options.photos / median_s:.1f}"
            rows.append(
                [
                    *(f"{size[0]} x {size[1]}, {name}", rate, f"{base_s / median_s:.2f}"),
                    *(f"{apart.mean():.2f}", str(apart.max())),
                ]
            )
            print(rows[-1], flush=True)
    header = ("photos, decoder", "photos a second", "times images.decode", "pixels off, mean", "most")
    report = f"""# JPEG decoders

{options.photos} JPEG photos of a toy city of each size, quality 90, to {SIDE_PX} x {SIDE_PX} pixels. Medians of
{options.rounds} alternating rounds, seconds of one thread's processor time. Scaled: the smallest scale that leaves both
sides {LEAST_PX} px. Off: against `images.decode`, of 255.

{shared.markdown_table(header, rows)}

simplejpeg {version("simplejpeg")}; Pillow's libjpeg-turbo is {features.version("libjpeg_turbo")}.

## Circumstances

{shared.circumstances(WHAT, load_at_start)}"""
    shared.publish(WHAT, report, options.report)


if __name__ == "__main__":
    main()
