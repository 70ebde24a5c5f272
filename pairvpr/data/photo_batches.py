"""Batches of photos that depend only on the manifest and the batch size.

B photos in a batch, S image side in pixels, G descriptor width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pairvpr.data import images
from pairvpr.data.manifest import Manifest


class PhotoSettings(Protocol):
    """How a network takes photos; `ModelConfig` says so of Pair-VPR's."""

    @property
    def image_size_px(self) -> int:
        """S, the side of the square that every photo is resized to."""
        ...

    @property
    def scaled_decoding(self) -> bool:
        """Whether large JPEGs are decoded at a scale."""
        ...

    @property
    def max_megapixels(self) -> float:
        """Photos of more pixels are rejected."""
        ...


@dataclass(frozen=True)
class PhotoBatch:
    """Decoded photos `first_id`, `first_id` + 1, ...: pixels (B, S, S, 3) uint8; `errors` and `remarks` by position.

    A broken photo has zeros as pixels, so that the shape of the forward pass stays the same; its row is dropped.
    """

    first_id: int
    pixels: NDArray[np.uint8]
    errors: dict[int, str]
    remarks: dict[int, str] = field(default_factory=dict)
    """Warnings about photos that were read (`images.Pixels`)."""

    def kept(self, descriptors: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids (n,) and rows (n, G) of the readable photos."""
        positions = np.array([i for i in range(len(self.pixels)) if i not in self.errors], dtype=np.int64)
        return self.first_id + positions, descriptors[positions]

    @property
    def rejected(self) -> dict[int, str]:
        """Errors by image id."""
        return {self.first_id + position: error for position, error in self.errors.items()}

    @property
    def remarked(self) -> dict[int, str]:
        """Remarks by image id."""
        return {self.first_id + position: remark for position, remark in self.remarks.items()}


def num_batches(num_images: int, batch_size: int) -> int:
    """The number of batches of a manifest."""
    return -(-num_images // batch_size)


def load_batch(manifest: Manifest, batch: int, batch_size: int, settings: PhotoSettings) -> PhotoBatch:
    """Decode photos [batch * batch_size, (batch + 1) * batch_size) of the manifest as a network takes them."""
    first_id = batch * batch_size
    ids = range(first_id, min(first_id + batch_size, len(manifest)))
    pixels = np.zeros((len(ids), settings.image_size_px, settings.image_size_px, 3), np.uint8)
    errors: dict[int, str] = {}
    remarks: dict[int, str] = {}
    for position, image_id in enumerate(ids):
        try:
            photo = load_photo(manifest.url(image_id), settings)
        except images.BrokenImageError as error:
            errors[position] = str(error)
            continue
        pixels[position] = photo.rgb
        if photo.remark is not None:
            remarks[position] = photo.remark
    return PhotoBatch(first_id, pixels, errors, remarks)


def load_photo(url: str, settings: PhotoSettings) -> images.Pixels:
    """Load a photo's file as a network takes it. Raises as `images.load_upright` does."""
    return images.load_pixels(
        url, settings.image_size_px, scaled_decoding=settings.scaled_decoding, max_megapixels=settings.max_megapixels
    )
