"""Photos of any kind become upright RGB pixels of the network's size, or a `BrokenImageError` that says why."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pairvpr.data import images, storage
from pairvpr.models.pair_vpr import normalise
from tests.support.shared import SHARED, needs_shared, parity_arrays

ORIENTATION = 0x0112
# What a viewer does to show the stored pixels of each orientation upright, written out with numpy (rows, columns).
UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: stored[::-1].swapaxes(0, 1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: stored[:, ::-1].swapaxes(0, 1),
}
# The inverse: pixels to store so that they come out upright. 6 and 8 undo each other, the rest themselves.
STORED = UPRIGHT | {6: UPRIGHT[8], 8: UPRIGHT[6]}


def colourful(height: int = 24, width: int = 40) -> NDArray[np.uint8]:
    """A smooth picture without any symmetry."""
    rows, columns = np.mgrid[0:height, 0:width]
    red, green = 255 * columns / width, 255 * rows / height
    blue = 128 + 60 * np.sin(columns / 9.0) - 60 * (rows > height // 2)
    return np.stack([red, green, blue], axis=-1).astype(np.uint8)


def encoded(image: Image.Image, suffix: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, suffix, **options)
    return sink.getvalue()


def pillow_resize(image: Image.Image, side: int) -> NDArray[np.uint8]:
    return np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR))


@pytest.mark.parametrize(
    ("suffix", "options"),
    [("PNG", {}), ("BMP", {}), ("JPEG", {"quality": 80}), ("WEBP", {"quality": 80}), ("WEBP", {"lossless": True})],
)
def test_a_plain_photo_is_pillows_own_rgb_bilinear_resize(suffix: str, options: dict[str, object]) -> None:
    data = encoded(Image.fromarray(colourful()), suffix, **options)
    decoded = images.decode(data, 14)
    assert decoded.shape == (14, 14, 3)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, pillow_resize(Image.open(io.BytesIO(data)), 14))


def test_the_same_size_keeps_every_pixel() -> None:
    pixels = colourful(20, 20)
    np.testing.assert_array_equal(images.decode(encoded(Image.fromarray(pixels), "PNG"), 20), pixels)


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA", "RGBA"])
def test_png_modes_become_rgb(mode: str) -> None:
    grey = Image.fromarray(colourful(20, 20)).convert("L")
    original = grey.convert(mode)
    data = encoded(original, "PNG")
    assert Image.open(io.BytesIO(data)).mode == mode
    expected = np.asarray(original.convert("L")).astype(int)
    decoded = images.decode(data, 20).astype(int)
    assert np.abs(decoded - expected[..., None]).max() <= 1


def test_colours_of_a_palette_survive() -> None:
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 200, 30, 60])
    np.testing.assert_array_equal(images.decode(encoded(palette, "PNG"), 4), np.full((4, 4, 3), (200, 30, 60)))


def test_cmyk_jpeg_keeps_its_colours() -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    data = encoded(red, "JPEG", quality=95)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    decoded = images.decode(data, 8).astype(int)
    assert np.abs(decoded - np.array([255, 0, 0])).max() <= 4


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    levels = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    data = encoded(Image.fromarray(levels), "PNG")
    assert Image.open(io.BytesIO(data)).mode == "I;16"
    np.testing.assert_array_equal(images.decode(data, 8), np.repeat((levels >> 8)[..., None], 3, axis=2))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["PNG", "WEBP"])
def test_every_exif_orientation_comes_out_upright(suffix: str, orientation: int) -> None:
    upright = colourful(24, 24)
    stored = np.ascontiguousarray(STORED[orientation](upright))
    np.testing.assert_array_equal(UPRIGHT[orientation](stored), upright)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(Image.fromarray(stored), suffix, exif=exif, lossless=True)
    np.testing.assert_array_equal(images.decode(data, 24), upright)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_oblong_jpeg_comes_out_upright(orientation: int) -> None:
    upright = colourful(24, 40)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    decoded = images.decode(encoded(stored, "JPEG", exif=exif, quality=100, subsampling=0), 16).astype(int)
    assert np.abs(decoded - pillow_resize(Image.fromarray(upright), 16)).max() <= 12


def scaled(data: bytes, denominator: int, side: int) -> NDArray[np.uint8]:
    """A JPEG as libjpeg decodes it at 1/1, 1/2, 1/4 or 1/8 of its size, not upright, resized as Pillow's thumbnails."""
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        image.draft(None, (width // denominator, height // denominator))
        image.load()
        assert image.size == (-(-width // denominator), -(-height // denominator))
        part = (0, 0, width / denominator, height / denominator)
        return np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR, box=part))


@pytest.mark.parametrize(
    ("height", "width", "denominator"),
    [
        (63, 200, 1),
        (64, 200, 2),
        (200, 64, 2),
        (127, 300, 2),
        (128, 128, 4),
        (255, 301, 4),
        (256, 257, 8),
        (600, 900, 8),
    ],
)
def test_scaled_decoding_keeps_twice_the_networks_side(height: int, width: int, denominator: int) -> None:
    data = encoded(Image.fromarray(colourful(height, width)), "JPEG", quality=85)
    expected = scaled(data, denominator, 16)
    np.testing.assert_array_equal(images.decode(data, 16, scaled_decoding=True), expected)
    whole = images.decode(data, 16)
    assert np.array_equal(whole, expected) == (denominator == 1)
    assert np.abs(whole.astype(int) - expected).max() <= 8


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"quality": 30}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_of_any_kind_are_decoded_at_a_scale(mode: str, options: dict[str, object]) -> None:
    data = encoded(Image.fromarray(colourful(128, 160)).convert(mode), "JPEG", **options)
    decoded = images.decode(data, 16, scaled_decoding=True)
    np.testing.assert_array_equal(decoded, scaled(data, 4, 16))


@pytest.mark.parametrize("suffix", ["PNG", "BMP", "WEBP"])
def test_other_photos_are_decoded_whole(suffix: str) -> None:
    data = encoded(Image.fromarray(colourful(256, 300)), suffix)
    np.testing.assert_array_equal(images.decode(data, 16, scaled_decoding=True), images.decode(data, 16))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_small_jpeg_is_decoded_whole_bit_by_bit(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    noise = np.random.default_rng(0).integers(0, 256, (70, 63, 3), np.uint8)
    data = encoded(Image.fromarray(noise), "JPEG", exif=exif)
    np.testing.assert_array_equal(images.decode(data, 16, scaled_decoding=True), images.decode(data, 16))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_scaled_decoding_comes_out_upright(orientation: int) -> None:
    upright = colourful(130, 300)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    data = encoded(stored, "JPEG", exif=exif, quality=95)
    expected = UPRIGHT[orientation](scaled(data, 4, 16))
    decoded = images.decode(data, 16, scaled_decoding=True)
    np.testing.assert_array_equal(decoded, expected)
    assert np.abs(decoded.astype(int) - pillow_resize(Image.fromarray(upright), 16)).max() <= 12


def test_a_jpeg_of_several_pictures_is_decoded_at_a_scale() -> None:
    first, second = (Image.fromarray(colourful(128, width)) for width in (160, 200))
    data = encoded(first, "MPO", save_all=True, append_images=[second])
    decoded = images.decode(data, 16, scaled_decoding=True)
    np.testing.assert_array_equal(decoded, scaled(data, 4, 16))


def test_a_truncated_photo_is_broken_at_any_scale() -> None:
    data = encoded(Image.fromarray(colourful(256, 256)), "JPEG")
    for length in (len(data) - 200, len(data) // 2, 12, 3):
        with pytest.raises(images.BrokenImageError, match=r"\w+: \w+"):
            images.decode(data[:length], 16, scaled_decoding=True)


def test_16_bit_grey_with_an_orientation() -> None:
    levels = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    data = encoded(Image.fromarray(np.ascontiguousarray(levels[::-1, ::-1])), "PNG", exif=exif)
    np.testing.assert_array_equal(images.decode(data, 8)[..., 0], levels >> 8)


@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "BMP", "WEBP"])
def test_a_truncated_photo_is_broken(suffix: str) -> None:
    data = encoded(Image.fromarray(colourful(64, 64)), suffix)
    for length in (len(data) // 2, 12, 3):
        with pytest.raises(images.BrokenImageError, match=r"\w+: \w+"):
            images.decode(data[:length], 16)


@pytest.mark.parametrize("data", [b"", b"not a photo, but text\n", b"\xff\xd8\xff", b"GIF89a", bytes(4096)])
def test_foreign_bytes_are_broken_with_a_reason(data: bytes) -> None:
    with pytest.raises(images.BrokenImageError, match=r"\w+Error: \S+"):
        images.decode(data, 16)


@given(st.data())
def test_damaged_bytes_give_pixels_or_a_reason(data: st.DataObject) -> None:
    suffix = data.draw(st.sampled_from(["JPEG", "PNG", "BMP", "WEBP"]))
    damaged = bytearray(encoded(Image.fromarray(colourful()), suffix))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(images.BrokenImageError):  # and nothing else
        decoded = images.decode(bytes(damaged), 8, scaled_decoding=data.draw(st.booleans()))
        assert (decoded.shape, decoded.dtype) == ((8, 8, 3), np.uint8)


@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF"])
def test_a_photo_of_more_pixels_than_allowed_is_refused_by_the_settings_name(suffix: str) -> None:
    data = encoded(Image.new("RGB", (20, 20)), suffix)
    assert images.decode(data, 8, max_megapixels=400e-6).shape == (8, 8, 3)
    with pytest.raises(images.BrokenImageError, match=r"20 x 20 pixels .* more than model\.max_megapixels=0\.000399"):
        images.decode(data, 8, max_megapixels=399e-6)


def test_pillows_own_limit_has_no_say(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("RGB", (30, 30)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert images.decode(data, 8).shape == (8, 8, 3)
    assert [str(warning.message) for warning in caught] == []


def test_load_reads_a_file_and_names_what_is_wrong_with_it(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(encoded(Image.fromarray(colourful(8, 8)), "PNG"))
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    np.testing.assert_array_equal(images.load(str(tmp_path / "photo.png"), 8), colourful(8, 8))
    for name in ("text.jpg", "empty.jpg"):
        with pytest.raises(
            images.BrokenImageError, match=r"^UnidentifiedImageError: expected one of JPEG, PNG, BMP, .*AVIF$"
        ):
            images.load(str(tmp_path / name), 8)
    with pytest.raises(images.BrokenImageError, match="FileNotFoundError: No such file"):
        images.load(str(tmp_path / "missing.jpg"), 8)
    with pytest.raises(images.BrokenImageError, match="IsADirectoryError"):
        images.load(str(tmp_path / "folder.jpg"), 8)
    with pytest.raises(images.BrokenImageError, match="FileNotFoundError: no such file"):
        images.load("memory://test-images/missing.jpg", 8)


@pytest.mark.parametrize(
    ("number", "is_photos_fault"),
    [
        (errno.EACCES, True),
        (errno.ENOTDIR, True),
        (errno.ELOOP, True),
        (errno.EIO, False),
        (errno.EMFILE, False),
        (errno.ESTALE, False),
    ],
)
def test_a_failing_disk_is_no_broken_photo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_photos_fault: bool
) -> None:
    (tmp_path / "photo.png").touch()

    def read_bytes(_: str) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(storage, "read_bytes", read_bytes)
    expected = images.BrokenImageError if is_photos_fault else storage.StorageError
    with pytest.raises(expected, match=os.strerror(number)):
        images.load(str(tmp_path / "photo.png"), 8)


@needs_shared
def test_first_query_of_the_corridor() -> None:
    expected = parity_arrays("corridor_evaluation")["first_query_tensor"]
    expected = expected.reshape(expected.shape[-3:])
    folders = [path for path in (SHARED / "data" / "rtabmap_corridor").iterdir() if path.is_dir()]
    (queries,) = [folder for folder in folders if "quer" in folder.name]
    first = min(path for path in queries.iterdir() if path.suffix == ".jpg")
    pixels = images.load(str(first), len(expected[0]))
    prepared = normalise(torch.from_numpy(pixels).unsqueeze(0))[0].numpy()
    np.testing.assert_allclose(prepared, expected, rtol=0, atol=1e-6)
