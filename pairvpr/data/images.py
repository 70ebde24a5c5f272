"""From the bytes of a photo to upright RGB pixels of the network's size.

S = image side in pixels. Normalisation happens on the device, see `pairvpr.models.pair_vpr`.
"""

from __future__ import annotations

import errno
import io
import math
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE

from pairvpr.config.schema import MAX_MEGAPIXELS
from pairvpr.data import storage
from pairvpr.data.jpeg_end import lacks_end, with_end
from pairvpr.data.photo_metadata import orientation_of, webp_size_px, without_metadata
from pairvpr.quiet import ignore_warnings

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "AVIF")
"""Pillow's names. In a file with several pictures (MPO, GIF, animated WebP and PNG, TIFF), the first is the photo."""

SCALED_SIDES = 2
"""Scaled decoding keeps both sides at least this many times the network's side. A value of 1 would scale more photos
(some decode twice as fast), but change descriptors five times as much (benchmarks/scaled_decoding.py)."""

BROKEN_LOCALLY = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)

NO_END = "no end marker"
NARROW = "narrow 16-bit range"
FEWEST_SHADES = 32
"""Of 256. A 16-bit photo with fewer shades left gets a remark: it is nearly one colour."""

_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transpose that turns each orientation upright."""

_Box = tuple[float, float, float, float]


class BrokenImageError(Exception):
    """A photo that can't be read; the message says why."""


class ForeignFormatError(BrokenImageError):
    """Bytes that do not begin like an image of a known format."""


@dataclass(frozen=True)
class Photo:
    """Upright RGB; `remark` is a warning about the file (`NO_END`, or a text that begins with `NARROW`)."""

    image: Image.Image
    remark: str | None = None


@dataclass(frozen=True)
class Pixels:
    """(S, S, 3) uint8, the network's input; `remark` as in `Photo`."""

    rgb: NDArray[np.uint8]
    remark: str | None = None


def decode(
    data: bytes, image_size_px: int, *, scaled_decoding: bool = False, max_megapixels: float = MAX_MEGAPIXELS
) -> NDArray[np.uint8]:
    """(S, S, 3) uint8: upright RGB, resized bilinearly on 8-bit pixels, aspect ratio not kept (method, section 3).

    With `scaled_decoding` a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, the smallest that leaves both sides
    `SCALED_SIDES` times S; other photos, and JPEGs too small for that, are decoded as without it.

    Raises `BrokenImageError` as `decode_upright`.
    """
    return decode_pixels(data, image_size_px, scaled_decoding=scaled_decoding, max_megapixels=max_megapixels).rgb


def decode_pixels(
    data: bytes, image_size_px: int, *, scaled_decoding: bool = False, max_megapixels: float = MAX_MEGAPIXELS
) -> Pixels:
    """`decode`, with a remark on the photo."""

    def resized(image: Image.Image, orientation: int) -> Photo:
        box = _scaled_box(image, SCALED_SIDES * image_size_px) if scaled_decoding else None
        photo = _to_rgb(image)
        if box:
            return replace(photo, image=_turned(_resized(photo.image, image_size_px, box), orientation))
        return replace(photo, image=_resized(_turned(photo.image, orientation), image_size_px))

    photo = _opened(data, resized, max_megapixels)
    return Pixels(np.array(photo.image), photo.remark)


def decode_upright(data: bytes, *, max_megapixels: float = MAX_MEGAPIXELS) -> Image.Image:
    """Upright RGB in the photo's own size. Of the metadata, only a valid orientation is used.

    Raises `BrokenImageError` unless it is a complete photo: for truncated or foreign bytes, more pixels than allowed,
    and values without a standard range.
    """

    def upright(image: Image.Image, orientation: int) -> Photo:
        photo = _to_rgb(image)
        return replace(photo, image=_turned(photo.image, orientation))

    return _opened(data, upright, max_megapixels).image


def _opened(data: bytes, use: Callable[[Image.Image, int], Photo], max_megapixels: float) -> Photo:
    """The result of `use` on the open photo and its orientation."""
    file = without_metadata(data)

    def used(pixels: bytes) -> Photo:
        with _open(pixels, max_megapixels) as image:
            return use(image, file.orientation)

    try:
        if not lacks_end(file.pixels):
            return used(file.pixels)
        whole = with_end(file.pixels, lambda pixels: used(pixels).image)
        if whole is None:
            raise BrokenImageError("OSError: image file is truncated: its last pixels are missing")
        photo = used(whole)
        return replace(photo, remark=photo.remark or NO_END)
    except BrokenImageError:
        raise
    except UnidentifiedImageError as error:
        raise BrokenImageError(f"UnidentifiedImageError: expected one of {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on foreign bytes
        raise BrokenImageError(f"{type(error).__name__}: {error}") from error


def size_px(data: bytes) -> tuple[int, int]:
    """Width and height of a photo as its header states them, without decoding it.

    Raises `ForeignFormatError` for bytes that are no image, and `BrokenImageError` for a damaged header.
    """
    try:
        pixels = without_metadata(data).pixels
        known = webp_size_px(pixels)
        if known is not None:
            return known
        with opened(pixels) as image:
            return image.size
    except UnidentifiedImageError as error:
        raise ForeignFormatError(f"expected one of {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on foreign bytes
        raise BrokenImageError(f"{type(error).__name__}: {error}") from error


def opened(data: bytes) -> Image.Image:
    """The undecoded photo, opened by the decoder that its first bytes select. May raise almost any exception.

    `Image.open` would apply its own, process-wide pixel limit.
    """
    ignore_warnings_of_metadata()
    Image.init()
    for name in FORMATS:
        factory, accepts = Image.OPEN[name]
        if accepts is not None and accepts(data[:32]) is True:
            return factory(io.BytesIO(data), "")
    raise UnidentifiedImageError


def _open(data: bytes, max_megapixels: float) -> Image.Image:
    """The undecoded photo. Raises `BrokenImageError` if it has too many pixels."""
    _check_size(webp_size_px(data), max_megapixels)
    if Image.MAX_IMAGE_PIXELS is not None:  # Pillow checks a TIFF against it again, and refuses twice as many
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, math.ceil(max_megapixels * 1e6 / 2))
    image = opened(data)
    _check_size(image.size, max_megapixels)
    return image


def ignore_warnings_of_metadata() -> None:
    """Silence Pillow's warnings of damaged metadata, which is not used here."""
    ignore_warnings(module=r"PIL\.")


def _check_size(size_px: tuple[int, int] | None, max_megapixels: float) -> None:
    if size_px is not None and size_px[0] * size_px[1] > max_megapixels * 1e6:
        raise BrokenImageError(
            f"{size_px[0]:,} x {size_px[1]:,} pixels are {size_px[0] * size_px[1] / 1e6:,.1f} megapixels, more than "
            f"model.max_megapixels={max_megapixels:g}"
        )


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    method = _TURNED.get(orientation)
    return image if method is None else image.transpose(method)


def _resized(image: Image.Image, side_px: int, box: _Box | None = None) -> Image.Image:
    return image.resize((side_px, side_px), Image.Resampling.BILINEAR, box)


def _scaled_box(image: Image.Image, least_side_px: int) -> _Box | None:
    """Have libjpeg decode a JPEG at a scale that leaves both sides this long, whichever way up the photo is.

    Returns the box of the photo in scaled pixels, which ends inside the last ones; None if it is not scaled.
    """
    whole = image.size
    drafted = image.draft(None, (least_side_px, least_side_px))
    return drafted[1] if drafted and image.size != whole else None


def load(
    url: str, image_size_px: int, *, scaled_decoding: bool = False, max_megapixels: float = MAX_MEGAPIXELS
) -> NDArray[np.uint8]:
    """`decode` of a file. Raises as `load_upright` does."""
    return load_pixels(url, image_size_px, scaled_decoding=scaled_decoding, max_megapixels=max_megapixels).rgb


def load_pixels(
    url: str, image_size_px: int, *, scaled_decoding: bool = False, max_megapixels: float = MAX_MEGAPIXELS
) -> Pixels:
    """`decode_pixels` of a file. Raises as `load_upright` does."""
    return decode_pixels(read(url), image_size_px, scaled_decoding=scaled_decoding, max_megapixels=max_megapixels)


def from_image(image: Image.Image, image_size_px: int) -> NDArray[np.uint8]:
    """`decode` of an open photo, which is not modified and never decoded at a reduced scale.

    Raises `BrokenImageError` as `decode_upright`.
    """
    ignore_warnings_of_metadata()
    try:
        return np.array(_resized(_turned(_to_rgb(image).image, orientation_of(image)), image_size_px))
    except BrokenImageError:
        raise
    except Exception as error:  # a lazily opened image is decoded here
        raise BrokenImageError(f"{type(error).__name__}: {error}") from error


def load_upright(url: str, *, max_megapixels: float = MAX_MEGAPIXELS) -> Image.Image:
    """`decode_upright` of a file. Raises as `decode_upright` and `read` do."""
    return decode_upright(read(url), max_megapixels=max_megapixels)


def read(url: str) -> bytes:
    """The bytes of a photo. Raises `BrokenImageError` if the file is missing or a local one is unreadable.

    Raises `StorageError` if storage can't be reached or a disk fails: the photo is not to blame.
    """
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
    """Refuse pipes and devices, which would block or never end; reading a directory raises by itself."""
    mode = storage.local_path(url).stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise BrokenImageError("not a regular file")


def _to_rgb(image: Image.Image) -> Photo:
    """Convert any mode to RGB; 16-bit grey is scaled to 8 bits, which Pillow would clip.

    Raises `BrokenImageError` for floating point and 32-bit values, whose range is undefined.
    """
    bits = _bits_per_value(image)
    if image.mode.startswith("I"):
        values = np.asarray(image)
        lowest, highest = (int(values.min()), int(values.max())) if values.size else (0, 0)
        if lowest < 0 or highest > 0xFFFF:
            raise BrokenImageError(f"grey values from {lowest:,} to {highest:,}; expected those of 8 or 16 bits")
        grey = Image.fromarray((values.astype(np.uint16) >> 8).astype(np.uint8))
        return Photo(grey.convert("RGB"), _narrow(lowest, highest))
    if image.mode == "F":
        raise BrokenImageError("floating point values, whose range is not known; expected 8 or 16 bits a value")
    photo = image.convert("RGB")
    if bits != 16:
        return Photo(photo)
    extrema: Any = photo.getextrema()  # a pair per band; the lower 8 bits are gone
    return Photo(photo, _narrow(min(low for low, _ in extrema) << 8, max(high for _, high in extrema) << 8 | 0xFF))


def _narrow(lowest: int, highest: int) -> str | None:
    """A remark on 16-bit values that leave few shades."""
    if (highest >> 8) - (lowest >> 8) >= FEWEST_SHADES:
        return None
    return (
        f"{NARROW}: values {lowest:,} to {highest:,} of 0 to 65,535 become shades {lowest >> 8} to {highest >> 8} of 0 "
        "to 255; expected values stretched over 16 bits, or 8 bits, by one rule for all photos"
    )


def _bits_per_value(image: Image.Image) -> int:
    """16 for PNG and TIFF files of which Pillow keeps only the upper 8 bits."""
    if image.format == "PNG":
        return 16 if any(";16" in str(tile[3]) for tile in image.tile) else 8  # pyright: ignore
    if image.format == "TIFF":
        bits: Any = image.tag_v2.get(BITSPERSAMPLE, (8,))  # pyright: ignore
        return bits[0] if isinstance(bits, tuple) and bits else 8
    return 8
