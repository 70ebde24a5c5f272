"""Small pictures of photos as data: URIs, upright, under a budget of bytes."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pairvpr.config.schema import MAX_MEGAPIXELS
from pairvpr.data import images, storage
from pairvpr.data.images import BrokenImageError

SIZES = ((264, 72), (224, 66), (192, 60), (160, 54), (128, 48), (96, 40), (64, 30))
"""Longer side in pixels and WebP quality, the first one that fits the budget is taken."""
DECODE_SIDE_PX = 264
NUM_THREADS = 4
MOST_REASON = 160
HEAT_SIDE_PX = 200
HEAT_QUALITY = 60
HEAT_COLOUR = (255, 176, 0)
HEAT_ALPHA = 215
HEAT_QUANTILES = (0.5, 0.99)


@dataclass(frozen=True)
class Picture:
    """A photo as the page shows it."""

    uri: str | None
    """data: URI, None where the photo can't be shown."""
    reason: str | None = None
    """Why it can't."""


def pictures(urls: Sequence[str], budget_bytes: int, max_megapixels: float = MAX_MEGAPIXELS) -> list[Picture]:
    """A picture of each photo (path or URL); together their URIs take at most `budget_bytes`.

    A photo that is gone, can't be read or has more than `max_megapixels`, or whose store can't be reached, gets the
    reason instead.
    """
    most_bytes = max(1, budget_bytes // max(1, len(urls)))
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        return list(threads.map(lambda url: picture(url, most_bytes, max_megapixels), urls))


def picture(url: str, most_bytes: int, max_megapixels: float = MAX_MEGAPIXELS) -> Picture:
    """One photo whose URI takes at most `most_bytes`."""
    try:
        image = images.load_upright(url, max_megapixels=max_megapixels)
    except (BrokenImageError, storage.StorageError, OSError) as error:
        return Picture(None, storage.reason(error)[:MOST_REASON])
    image.thumbnail((DECODE_SIDE_PX, DECODE_SIDE_PX), Image.Resampling.LANCZOS, reducing_gap=3.0)
    uri = next((uri for side, quality in SIZES if len(uri := _uri(image, side, quality)) <= most_bytes), None)
    return Picture(uri, None if uri else "no room for its picture")


def _uri(image: Image.Image, side_px: int, quality: int) -> str:
    smaller = image.copy()
    smaller.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    return _encoded(smaller, quality)


def _encoded(image: Image.Image, quality: int) -> str:
    file = io.BytesIO()
    image.save(file, "WEBP", quality=quality, method=4)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def heat_uri(weights: NDArray[np.float32], size_px: tuple[int, int]) -> str:
    """A grid of weights (rows, columns) as a picture to lay over an upright photo of width and height `size_px`.

    Its opacity grows with the weight, from none at the median.
    """
    low, high = np.quantile(weights, HEAT_QUANTILES)
    strength = np.clip((weights - low) / max(high - low, 1e-12), 0, 1)
    rgba = np.empty((*weights.shape, 4), np.uint8)
    rgba[..., :3] = HEAT_COLOUR
    rgba[..., 3] = np.round(HEAT_ALPHA * strength)
    scale = min(1.0, HEAT_SIDE_PX / max(size_px))
    width, height = (max(1, round(scale * side)) for side in size_px)
    return _encoded(Image.fromarray(rgba).resize((width, height), Image.Resampling.BICUBIC), HEAT_QUALITY)
