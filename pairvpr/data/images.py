"""From the bytes of a photo to upright RGB pixels of the network's size.

S = image side in pixels. Normalisation happens on the device, see `pairvpr.models.pair_vpr`.
"""

from __future__ import annotations

import errno
import io
import stat
import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from pairvpr.data import storage

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "AVIF")
"""Pillow's names. Of a file of several pictures (MPO, GIF, animated WebP and PNG, TIFF) the first one is the photo."""

SCALED_SIDES = 2
"""Scaled decoding leaves both sides of a photo at least so many times the network's side. With 1 more photos would be
scaled, some decoded twice as fast, but descriptors change five times as much (benchmarks/scaled_decoding.py)."""

BROKEN_LOCALLY = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)

_Box = tuple[float, float, float, float]


class BrokenImageError(Exception):
    """A photo that can't be read; the message says why."""


def decode(data: bytes, image_size_px: int, *, scaled_decoding: bool = False) -> NDArray[np.uint8]:
    """(S, S, 3) uint8: upright RGB, resized bilinearly on 8-bit pixels, aspect ratio not kept (method, section 3).

    With `scaled_decoding` a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, the smallest that leaves both sides
    `SCALED_SIDES` times S; other photos, and JPEGs too small for that, are decoded as without it.

    Raises `BrokenImageError` as `decode_upright`.
    """

    def resized(image: Image.Image) -> Image.Image:
        if scaled_decoding and (box := _scaled_box(image, SCALED_SIDES * image_size_px)):
            return ImageOps.exif_transpose(_resized(_to_rgb(image), image_size_px, box))
        return _resized(_upright(image), image_size_px)

    return np.array(_opened(data, resized))


def decode_upright(data: bytes) -> Image.Image:
    """Upright RGB in the photo's own size.

    Raises `BrokenImageError` for what is not a whole photo: truncated or foreign bytes, absurd sizes.
    """
    return _opened(data, _upright)


def _opened(data: bytes, use: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """What `use` makes of the photo while it is open."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return use(image)
    except UnidentifiedImageError as error:  # whose own message holds a memory address, another one in every run
        raise BrokenImageError(f"UnidentifiedImageError: expected one of {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on foreign bytes
        raise BrokenImageError(f"{type(error).__name__}: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    return _to_rgb(ImageOps.exif_transpose(image))


def _resized(image: Image.Image, side_px: int, box: _Box | None = None) -> Image.Image:
    return image.resize((side_px, side_px), Image.Resampling.BILINEAR, box)


def _scaled_box(image: Image.Image, least_side_px: int) -> _Box | None:
    """Have libjpeg decode a JPEG at a scale that leaves both sides this long, whichever way up the photo is.

    Returns the part of the scaled pixels that the photo takes, which ends within the last ones; None without a scale.
    """
    whole = image.size
    drafted = image.draft(None, (least_side_px, least_side_px))
    return drafted[1] if drafted and image.size != whole else None


def load(url: str, image_size_px: int, *, scaled_decoding: bool = False) -> NDArray[np.uint8]:
    """`decode` of a file. Raises as `load_upright`."""
    return decode(_read(url), image_size_px, scaled_decoding=scaled_decoding)


def from_image(image: Image.Image, image_size_px: int) -> NDArray[np.uint8]:
    """`decode` of a photo that is opened already; it is left as it is, and never decoded at a scale.

    Raises `BrokenImageError` as `decode_upright`.
    """
    try:
        return np.array(_resized(_upright(image), image_size_px))
    except Exception as error:  # an image that Pillow opened lazily is decoded here
        raise BrokenImageError(f"{type(error).__name__}: {error}") from error


def load_upright(url: str) -> Image.Image:
    """`decode_upright` of a file. Raises `BrokenImageError`, also where the file is gone or a local one is forbidden.

    Raises `StorageError` where a store can't be reached or a disk fails: that is a fault of the run, not of the photo.
    """
    return decode_upright(_read(url))


def _read(url: str) -> bytes:
    is_local = storage.is_local(url)
    broken = BROKEN_LOCALLY if is_local else (FileNotFoundError, IsADirectoryError)
    try:
        if is_local:
            _require_file(url)
        return storage.read_bytes(url)
    except broken as error:
        raise BrokenImageError(f"{type(error).__name__}: {error.strerror or 'no such file'}") from error
    except OSError as error:
        if not is_local:
            raise
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            raise BrokenImageError(f"{type(error).__name__}: {error.strerror}") from error
        raise storage.StorageError(f"{url}: {type(error).__name__}: {error.strerror}") from error


def _require_file(url: str) -> None:
    """Refuse pipes and devices, which would block or never end; a directory says so itself when it is read."""
    mode = storage.local_path(url).stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise BrokenImageError("not a regular file")


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode; 16-bit grey is scaled to 8 bits, where Pillow alone would clip it."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")
