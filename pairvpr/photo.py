"""The accepted forms of a photo, and their conversion to the network's pixels. S image side in pixels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pairvpr.data import images
from pairvpr.data.photo_batches import PhotoSettings
from pairvpr.errors import PhotoError, UserError

Photo: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]"
"""A path or URL, the bytes of an image file, a Pillow image, or upright RGB pixels (H, W, 3) uint8."""


@dataclass(frozen=True)
class Asked:
    """A query photo; `place` is its position among several."""

    photo: Photo
    place: str = ""

    def pixels(self, network: PhotoSettings) -> NDArray[np.uint8]:
        """(S, S, 3) uint8, the network's input. Raises `PhotoError`, which names the photo.

        Images and arrays are already decoded, so `scaled_decoding` and `max_megapixels` don't apply to them.
        """
        try:
            return self._pixels(network)
        except (images.BrokenImageError, ValueError) as error:  # a path with NUL is a `ValueError`
            raise PhotoError(self.name, str(error)) from error

    def _pixels(self, network: PhotoSettings) -> NDArray[np.uint8]:
        side_px, scaled, max_megapixels = network.image_size_px, network.scaled_decoding, network.max_megapixels
        match self.photo:
            case bytes() as data:
                return images.decode(data, side_px, scaled_decoding=scaled, max_megapixels=max_megapixels)
            case Image.Image() as image:
                return images.from_image(image, side_px)
            case np.ndarray() as array:
                if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
                    raise UserError("expected RGB pixels (H, W, 3) uint8")
                return images.from_image(Image.fromarray(array), side_px)
            case str() | os.PathLike():
                url = os.fspath(self.photo)
                return images.load(url, side_px, scaled_decoding=scaled, max_megapixels=max_megapixels)
        raise UserError("expected a path, URL, bytes, PIL.Image or an array (H, W, 3) uint8")

    @property
    def name(self) -> str:
        """Its name in messages."""
        match self.photo:
            case bytes() as data:
                name = f"{len(data):,} bytes"
            case Image.Image() as image:
                name = getattr(image, "filename", "") or f"PIL.Image {image.width} x {image.height}"
            case np.ndarray() as array:
                name = f"array {array.shape} {array.dtype}"
            case str() | os.PathLike():
                name = os.fspath(self.photo)
            case other:
                name = type(other).__name__
        return f"{self.place}{name}"


def is_many(photos: Photo | Sequence[Photo]) -> TypeGuard[Sequence[Photo]]:
    """Whether these are several photos; str and bytes are sequences, too, but not of photos."""
    return isinstance(photos, Sequence) and not isinstance(photos, str | bytes)


def asked(photos: Photo | Sequence[Photo]) -> list[Asked]:
    """A list of all photos, or of the only one."""
    if is_many(photos):
        return [Asked(photo, f"photos[{number}]: ") for number, photo in enumerate(photos)]
    return [Asked(photos)]  # pyright: ignore[reportArgumentType]  (not many)
