"""Augmentations of both training stages, on Pillow's 8-bit pixels.

S = image side in pixels. All randomness comes from the caller's numpy generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

CROP_AREA = (0.7, 1.0)  # share of the photo
CROP_ASPECT = (3 / 4, 4 / 3)  # width / height
CROP_TRIES = 10
JITTER = (0.6, 1.4)
JITTERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)

BIN = 9 / 30  # bin 9 of 31, the first being 0
SHEAR = 0.3 * BIN
TRANSLATE = 150 / 331 * BIN  # share of the side
ROTATE_DEGREES = 30 * BIN
ENHANCE = 0.9 * BIN
POSTERIZE_BITS = 8 - round(4 * BIN)
SOLARIZE_FROM = math.ceil(255 * (1 - BIN))  # the first inverted value: the bin itself, 178.5, is not an integer


def augment_stage_one(image: Image.Image, image_size_px: int, rng: Generator) -> NDArray[np.uint8]:
    """(S, S, 3) uint8 of an RGB photo: random resized crop, then colour jitter (method, section 4)."""
    box = crop_box(image.width, image.height, rng)
    crop = image.crop(box).resize((image_size_px, image_size_px), Image.Resampling.BILINEAR)
    return np.array(colour_jitter(crop, rng))


def augment_stage_two(image: Image.Image, image_size_px: int, num_operations: int, rng: Generator) -> NDArray[np.uint8]:
    """(S, S, 3) uint8 of an RGB photo: resized, aspect ratio not kept, then RandAugment (method, section 5)."""
    resized = image.resize((image_size_px, image_size_px), Image.Resampling.BILINEAR)
    return np.array(rand_augment(resized, num_operations, rng))


def crop_box(width_px: int, height_px: int, rng: Generator) -> tuple[int, int, int, int]:
    """(left, upper, right, lower) in px: uniform in area, log-uniform in aspect ratio, anywhere inside the photo.

    If no try fits, the largest central crop with an allowed aspect ratio.
    """
    for _ in range(CROP_TRIES):
        area = rng.uniform(*CROP_AREA) * width_px * height_px
        aspect = math.exp(rng.uniform(*np.log(CROP_ASPECT)))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= width_px and 0 < height <= height_px:
            left, upper = int(rng.integers(width_px - width + 1)), int(rng.integers(height_px - height + 1))
            return left, upper, left + width, upper + height
    width = min(width_px, max(1, round(height_px * CROP_ASPECT[1])))
    height = min(height_px, max(1, round(width_px / CROP_ASPECT[0])))
    left, upper = (width_px - width) // 2, (height_px - height) // 2
    return left, upper, left + width, upper + height


def colour_jitter(image: Image.Image, rng: Generator) -> Image.Image:
    """Brightness, contrast and saturation, each by its own factor, in random order."""
    for index in rng.permutation(len(JITTERS)):
        image = JITTERS[index](image).enhance(rng.uniform(*JITTER))
    return image


def rand_augment(image: Image.Image, num_operations: int, rng: Generator) -> Image.Image:
    """Apply this many of the fourteen operations, drawn uniformly with replacement, each with a random sign."""
    for index in rng.integers(len(OPERATIONS), size=num_operations):
        sign = 1 if rng.integers(2) else -1
        image = OPERATIONS[index](image, sign)
    return image


def _affine(image: Image.Image, xx: float, xy: float, yx: float, yy: float) -> Image.Image:
    """Output point (u, v) shows the input at (xx u + xy v, yx u + yy v), in px from the upper left corner."""
    return image.transform(
        image.size, Image.Transform.AFFINE, (xx, xy, 0, yx, yy, 0), Image.Resampling.BILINEAR, fillcolor=0
    )


def _shift(image: Image.Image, right_px: int, down_px: int) -> Image.Image:
    """Shift by whole pixels, filling with black, as Pillow does for crops beyond the border."""
    return image.crop((-right_px, -down_px, image.width - right_px, image.height - down_px))


def identity(image: Image.Image, sign: int) -> Image.Image:
    """The unchanged photo."""
    return image


def shear_x(image: Image.Image, sign: int) -> Image.Image:
    """Horizontal shear; the upper left corner stays."""
    return _affine(image, 1, sign * SHEAR, 0, 1)


def shear_y(image: Image.Image, sign: int) -> Image.Image:
    """Vertical shear; the upper left corner stays."""
    return _affine(image, 1, 0, sign * SHEAR, 1)


def translate_x(image: Image.Image, sign: int) -> Image.Image:
    """Translate to the right by whole pixels (sign +1)."""
    return _shift(image, sign * int(TRANSLATE * image.width), 0)


def translate_y(image: Image.Image, sign: int) -> Image.Image:
    """Translate down by whole pixels (sign +1)."""
    return _shift(image, 0, sign * int(TRANSLATE * image.height))


def rotate(image: Image.Image, sign: int) -> Image.Image:
    """Rotate counter-clockwise about the centre (sign +1), keeping the size."""
    return image.rotate(sign * ROTATE_DEGREES, Image.Resampling.BILINEAR, fillcolor=0)


def brightness(image: Image.Image, sign: int) -> Image.Image:
    """Brightness: away from black or towards it."""
    return ImageEnhance.Brightness(image).enhance(1 + sign * ENHANCE)


def colour(image: Image.Image, sign: int) -> Image.Image:
    """Saturation: away from the grey photo or towards it."""
    return ImageEnhance.Color(image).enhance(1 + sign * ENHANCE)


def contrast(image: Image.Image, sign: int) -> Image.Image:
    """Contrast: away from the mean grey or towards it."""
    return ImageEnhance.Contrast(image).enhance(1 + sign * ENHANCE)


def sharpness(image: Image.Image, sign: int) -> Image.Image:
    """Sharpness: away from the smoothed photo or towards it."""
    return ImageEnhance.Sharpness(image).enhance(1 + sign * ENHANCE)


def posterize(image: Image.Image, sign: int) -> Image.Image:
    """Posterize: clear the lowest bit."""
    return ImageOps.posterize(image, POSTERIZE_BITS)


def solarize(image: Image.Image, sign: int) -> Image.Image:
    """Solarize: invert bright values."""
    return ImageOps.solarize(image, SOLARIZE_FROM)


def auto_contrast(image: Image.Image, sign: int) -> Image.Image:
    """Autocontrast: stretch each channel to 0..255."""
    return ImageOps.autocontrast(image)


def equalize(image: Image.Image, sign: int) -> Image.Image:
    """Equalize each channel's histogram."""
    return ImageOps.equalize(image)


OPERATIONS: tuple[Callable[[Image.Image, int], Image.Image], ...] = (
    identity,
    shear_x,
    shear_y,
    translate_x,
    translate_y,
    rotate,
    brightness,
    colour,
    contrast,
    sharpness,
    posterize,
    solarize,
    auto_contrast,
    equalize,
)
