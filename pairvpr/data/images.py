"""From the bytes of a photo to upright RGB pixels of the network's size.

S = image side in pixels. Normalisation happens on the device, see `pairvpr.models.pair_vpr`.
"""

from __future__ import annotations

import errno
import io
import stat
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from pairvpr.data import storage

FORMATS = ("JPEG", "PNG", "BMP", "WEBP")  # Pillow opens MPO, a JPEG of several pictures, as a JPEG

BROKEN_LOCALLY = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class BrokenImageError(Exception):
    """A photo that can't be read; the message says why."""


def decode(data: bytes, image_size_px: int) -> NDArray[np.uint8]:
    """(S, S, 3) uint8: upright RGB, resized bilinearly on 8-bit pixels, aspect ratio not kept (method, section 3).

    Raises `BrokenImageError` as `decode_upright`.
    """
    upright = decode_upright(data)
    return np.array(upright.resize((image_size_px, image_size_px), Image.Resampling.BILINEAR))


def decode_upright(data: bytes) -> Image.Image:
    """Upright RGB in the photo's own size.

    Raises `BrokenImageError` for what is not a whole photo: truncated or foreign bytes, absurd sizes.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:  # whose own message holds a memory address, another one in every run
        raise BrokenImageError(f"UnidentifiedImageError: expected one of {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on foreign bytes
        raise BrokenImageError(f"{type(error).__name__}: {error}") from error


def load(url: str, image_size_px: int) -> NDArray[np.uint8]:
    """`decode` of a file. Raises as `load_upright`."""
    return decode(_read(url), image_size_px)


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
