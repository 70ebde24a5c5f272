"""Augmentation: every operation against a formula over pixels written out in numpy, every draw against its bounds."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from pairvpr.data import augment

Floats = NDArray[np.float64]
SIGNED = ["shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "colour", "contrast", "sharpness"]
UNSIGNED = ["identity", "posterize", "solarize", "auto_contrast", "equalize"]


def photo(height: int = 60, width: int = 60, seed: int = 0) -> Image.Image:
    """Smooth colours with noise, no value of which spans the whole range."""
    rows, columns = np.mgrid[0:height, 0:width]
    smooth = np.stack([40 + 150 * columns / width, 30 + 180 * rows / height, 90 + 60 * np.sin(columns / 7)], -1)
    noise = np.random.default_rng(seed).integers(-15, 16, smooth.shape)
    return Image.fromarray((smooth + noise).astype(np.uint8))


def pixels(image: Image.Image) -> Floats:
    return np.asarray(image, np.float64)


def bilinear_at(image: Floats, x: Floats, y: Floats) -> Floats:
    """Values at points given in px from the upper left corner (pixel centres at a half), black outside."""
    height, width, _ = image.shape
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    left, upper = np.floor(x - 0.5), np.floor(y - 0.5)
    total = np.zeros((*x.shape, 3))
    for right, lower in np.ndindex(2, 2):
        weight = np.abs(1 - right - (x - 0.5 - left)) * np.abs(1 - lower - (y - 0.5 - upper))
        column, row = (left + right).clip(0, width - 1).astype(int), (upper + lower).clip(0, height - 1).astype(int)
        total += weight[..., None] * image[row, column]
    return np.where(inside[..., None], total, 0)


def centres(image: Floats) -> tuple[Floats, Floats]:
    rows, columns = np.mgrid[0 : image.shape[0], 0 : image.shape[1]]
    return columns + 0.5, rows + 0.5


def luma(image: Floats) -> Floats:
    """ITU-R 601, which Pillow rounds to a whole value."""
    return np.floor(image @ [0.299, 0.587, 0.114] + 0.5)[..., None]


def shifted(image: Floats, down: int, right: int) -> Floats:
    moved = np.zeros_like(image)
    height, width, _ = image.shape
    moved[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = image[
        max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)
    ]
    return moved


def smoothed(image: Floats) -> Floats:
    """3 × 3 mean whose centre counts five times; the outermost pixels stay."""
    result = image.copy()
    around = sum(
        image[1 + i : image.shape[0] - 1 + i, 1 + j : image.shape[1] - 1 + j] for i in (-1, 0, 1) for j in (-1, 0, 1)
    )
    result[1:-1, 1:-1] = np.floor((around + 4 * image[1:-1, 1:-1]) / 13 + 0.5)
    return result


def rotated(image: Floats, degrees: float) -> Floats:
    """Counter-clockwise about the centre, seen with rows going down."""
    x, y = centres(image)
    angle, middle_x, middle_y = math.radians(degrees), image.shape[1] / 2, image.shape[0] / 2
    x, y = x - middle_x, y - middle_y
    back_x, back_y = x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)
    return bilinear_at(image, back_x + middle_x, back_y + middle_y)


def sheared(image: Floats, x_by_y: float, y_by_x: float) -> Floats:
    x, y = centres(image)
    return bilinear_at(image, x + x_by_y * y, y + y_by_x * x)


def blended(start: Floats | float, image: Floats, factor: float) -> Floats:
    return (start + factor * (image - start)).clip(0, 255)


def equalized(image: Floats) -> Floats:
    """Each value becomes the share of pixels below it; the step leaves out the brightest value's pixels."""
    result = np.empty_like(image)
    for channel in range(3):
        values = image[..., channel]
        step = (values.size - (values == values.max()).sum()) // 255
        for value in np.unique(values):
            result[values == value, channel] = min(255, (step // 2 + (values < value).sum()) // step)
    return result


def stretched(image: Floats) -> Floats:
    low, high = image.min((0, 1)), image.max((0, 1))
    return (image - low) * 255 / (high - low)


TRUTH: dict[str, Callable[[Floats, int], Floats]] = {
    "identity": lambda image, sign: image,
    "shear_x": lambda image, sign: sheared(image, sign * 0.09, 0),
    "shear_y": lambda image, sign: sheared(image, 0, sign * 0.09),
    "translate_x": lambda image, sign: shifted(image, 0, sign * int(0.136 * image.shape[1])),
    "translate_y": lambda image, sign: shifted(image, sign * int(0.136 * image.shape[0]), 0),
    "rotate": lambda image, sign: rotated(image, sign * 9),
    "brightness": lambda image, sign: blended(0, image, 1 + sign * 0.27),
    "colour": lambda image, sign: blended(luma(image), image, 1 + sign * 0.27),
    "contrast": lambda image, sign: blended(np.floor(luma(image).mean() + 0.5), image, 1 + sign * 0.27),
    "sharpness": lambda image, sign: blended(smoothed(image), image, 1 + sign * 0.27),
    "posterize": lambda image, sign: image - image % 2,
    "solarize": lambda image, sign: np.where(image > 178, 255 - image, image),
    "auto_contrast": lambda image, sign: stretched(image),
    "equalize": lambda image, sign: equalized(image),
}
EXACT = {"identity", "translate_x", "translate_y", "posterize", "solarize"}
ROUNDING = 1.3  # of a result to one of two whole values, of the grey it is blended with to another


def test_the_operations_are_the_fourteen() -> None:
    names = [operation.__name__ for operation in augment.OPERATIONS]
    assert sorted(names) == sorted(SIGNED + UNSIGNED) == sorted(TRUTH)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("operation", augment.OPERATIONS, ids=lambda operation: operation.__name__)
@pytest.mark.parametrize("shape", [(60, 60), (322, 322), (40, 71)])
def test_an_operation_equals_its_formula(
    operation: Callable[[Image.Image, int], Image.Image], sign: int, shape: tuple[int, int]
) -> None:
    image = photo(*shape)
    got, wanted = pixels(operation(image, sign)), TRUTH[operation.__name__](pixels(image), sign)
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=0, atol=0 if operation.__name__ in EXACT else ROUNDING)


@pytest.mark.parametrize("operation", augment.OPERATIONS, ids=lambda operation: operation.__name__)
def test_a_sign_matters_where_it_should_and_nowhere_else(operation: Callable[..., Image.Image]) -> None:
    plus, minus = pixels(operation(photo(), 1)), pixels(operation(photo(), -1))
    assert (operation.__name__ in SIGNED) == (not np.array_equal(plus, minus))
    assert (operation.__name__ == "identity") == np.array_equal(plus, pixels(photo()))


def test_rand_augment_draws_operations_and_signs_uniformly(monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[tuple[int, int]] = []

    def spy(index: int) -> Callable[[Image.Image, int], Image.Image]:
        return lambda image, sign: (met.append((index, sign)), image)[1]

    monkeypatch.setattr(augment, "OPERATIONS", tuple(spy(index) for index in range(14)))
    rng, num_photos = np.random.default_rng(1), 2800
    for _ in range(num_photos):
        augment.rand_augment(photo(), 3, rng)
    assert len(met) == 3 * num_photos
    counts = Counter(met)
    assert set(counts) == {(index, sign) for index in range(14) for sign in (1, -1)}
    expected = 3 * num_photos / 28
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 55.5  # chi2, 27 d.o.f., p = 0.001
    with_repeats = sum(len({index for index, _ in met[i : i + 3]}) < 3 for i in range(0, len(met), 3))
    assert with_repeats / num_photos == pytest.approx(1 - 13 * 12 / 14**2, abs=0.04)


def test_rand_augment_is_the_operations_one_after_another() -> None:
    image = photo()
    results = {
        augment.OPERATIONS[c](augment.OPERATIONS[b](augment.OPERATIONS[a](image, s), t), u).tobytes()
        for a, b, c in np.ndindex(14, 14, 14)
        if {a, b, c} <= {0, 3, 10, 11}
        for s in (1, -1)
        for t in (1, -1)
        for u in (1, -1)
    }
    drawn = [augment.rand_augment(image, 3, np.random.default_rng(seed)).tobytes() for seed in range(400)]
    share = np.mean([picture in results for picture in drawn])
    assert share == pytest.approx((4 / 14) ** 3, abs=0.03)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(0, 2**32 - 1))
def test_a_crop_lies_inside_and_keeps_to_the_bounds(width: int, height: int, seed: int) -> None:
    left, upper, right, lower = augment.crop_box(width, height, np.random.default_rng(seed))
    assert 0 <= left < right <= width
    assert 0 <= upper < lower <= height
    w, h = right - left, lower - upper
    assert (w - 0.5) / (h + 0.5) <= 4 / 3  # up to the rounding of both sides
    assert (w + 0.5) / (h - 0.5) >= 3 / 4
    if 3 / 4 <= width / height <= 4 / 3 and min(width, height) > 3:
        assert (w + 0.5) * (h + 0.5) >= 0.7 * width * height


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [(4000, 100, (1933, 0, 2066, 100)), (100, 4000, (0, 1933, 100, 2066)), (1, 1, (0, 0, 1, 1))],
)
def test_where_nothing_fits_the_crop_is_central(width: int, height: int, box: tuple[int, ...]) -> None:
    assert augment.crop_box(width, height, np.random.default_rng(0)) == box


class _AlwaysTooWide(np.random.Generator):
    """Draws the largest area and the widest aspect, which fit no photo that is not itself as wide."""

    def uniform(self, low: float = 0.0, high: float = 1.0, size: None = None) -> float:  # pyright: ignore
        return high


@pytest.mark.parametrize(("width", "height"), [(100, 100), (90, 100), (120, 100)])
def test_a_photo_of_an_allowed_shape_is_kept_whole_where_nothing_fits(width: int, height: int) -> None:
    rng = _AlwaysTooWide(np.random.PCG64(0))
    assert augment.crop_box(width, height, rng) == (0, 0, width, height)


def test_crops_are_distributed_as_rejection_sampling_says() -> None:
    rng, other = np.random.default_rng(0), random.Random(0)
    boxes = [augment.crop_box(512, 512, rng) for _ in range(4000)]
    wanted: list[tuple[float, float, float, float]] = []
    while len(wanted) < 4000:
        share, aspect = other.uniform(0.7, 1), (4 / 3) ** other.uniform(-1, 1)
        width, height = math.sqrt(share * aspect), math.sqrt(share / aspect)
        if width <= 1 and height <= 1:
            left, upper = other.uniform(0, 1 - width), other.uniform(0, 1 - height)
            wanted.append((left, upper, left + width, upper + height))
    got, truth = np.array(boxes) / 512, np.array(wanted)
    for of in (lambda box: box, lambda box: np.log((box[:, 2] - box[:, 0]) / (box[:, 3] - box[:, 1]))[:, None]):
        np.testing.assert_allclose(of(got).mean(0), of(truth).mean(0), atol=0.01)
        np.testing.assert_allclose(of(got).std(0), of(truth).std(0), atol=0.01)


def test_every_place_that_a_crop_fits_is_drawn() -> None:
    rng = np.random.default_rng(0)
    boxes = {augment.crop_box(10, 10, rng) for _ in range(2000)}
    nines = {box for box in boxes if (box[2] - box[0], box[3] - box[1]) == (9, 9)}
    assert nines == {(left, upper, left + 9, upper + 9) for left in (0, 1) for upper in (0, 1)}


def test_stage_one_resizes_its_crop_bilinearly_then_jitters() -> None:
    image, rng = photo(90, 120), np.random.default_rng(3)
    got = augment.augment_stage_one(image, 42, rng)
    again = np.random.default_rng(3)
    crop = image.crop(augment.crop_box(120, 90, again)).resize((42, 42), Image.Resampling.BILINEAR)
    assert got.shape == (42, 42, 3)
    assert got.dtype == np.uint8
    assert got.flags.writeable
    np.testing.assert_array_equal(got, np.asarray(augment.colour_jitter(crop, again)))
    assert rng.random() == again.random()


class _Jitters(np.random.Generator):
    """An order and three factors that the test chose."""

    def __init__(self, order: list[int], factors: list[float]) -> None:
        super().__init__(np.random.PCG64(0))
        self.order, self.factors = order, list(factors)

    def permutation(self, x: object, axis: int = 0) -> NDArray[np.int64]:
        return np.array(self.order)

    def uniform(self, low: float = 0.0, high: float = 1.0, size: None = None) -> float:  # pyright: ignore
        assert (low, high) == (0.6, 1.4)
        return self.factors.pop(0)


@given(st.permutations([0, 1, 2]), st.lists(st.floats(0.6, 1.4), min_size=3, max_size=3))
@settings(max_examples=30, deadline=None)
def test_jitter_is_image_enhance_in_the_drawn_order(order: list[int], factors: list[float]) -> None:
    wanted = image = photo()
    for index, factor in zip(order, factors, strict=True):
        wanted = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color][index](wanted).enhance(factor)
    got = augment.colour_jitter(image, _Jitters(order, factors))
    np.testing.assert_array_equal(pixels(got), pixels(wanted))


def test_factors_of_one_change_nothing() -> None:
    got = augment.colour_jitter(photo(), _Jitters([2, 0, 1], [1, 1, 1]))
    np.testing.assert_array_equal(pixels(got), pixels(photo()))


def test_stage_two_resizes_the_whole_photo_then_augments() -> None:
    image = photo(48, 100)
    got = augment.augment_stage_two(image, 56, 2, np.random.default_rng(5))
    resized = image.resize((56, 56), Image.Resampling.BILINEAR)
    assert got.shape == (56, 56, 3)
    assert got.dtype == np.uint8
    assert got.flags.writeable
    np.testing.assert_array_equal(got, np.asarray(augment.rand_augment(resized, 2, np.random.default_rng(5))))
    untouched = augment.augment_stage_two(image, 56, 0, np.random.default_rng(5))
    np.testing.assert_array_equal(untouched, np.asarray(resized))


def _stage_two(image: Image.Image, image_size_px: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    return augment.augment_stage_two(image, image_size_px, 3, rng)


@pytest.mark.parametrize("function", [augment.augment_stage_one, _stage_two])
def test_the_generator_alone_decides(function: Callable[..., NDArray[np.uint8]]) -> None:
    image = photo()
    before = image.tobytes()
    first, again, other = (function(image, 28, np.random.default_rng(seed)) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert image.tobytes() == before
