"""Metadata never decides about pixels, what is odd about a photo is said, and a limit on pixels bounds memory."""

from __future__ import annotations

import io
import os
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import IFDRational

from pairvpr.config.schema import ModelConfig
from pairvpr.data import images
from pairvpr.errors import PhotoError
from pairvpr.photo import Asked
from tests.support.shared import SHARED, needs_shared

SIDE_PX = 14
NUM_SHORT, NUM_LONG = 400, 20_000
ORIENTATION, GPS = 0x0112, 0x8825


def picture(height: int = 60, width: int = 88) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    red, green = 255 * columns / width, 255 * rows / height
    blue = 128 + 60 * np.sin(columns / 9.0) - 60 * (rows > height // 2)
    return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def exif_block(orientation: int | None = None) -> bytes:
    exif = Image.Exif()
    exif[0x010F] = "camera"
    if orientation is not None:
        exif[ORIENTATION] = orientation
    exif[GPS] = {1: "N", 2: (37.0, 30.0, 1.5), 3: "E", 4: (122.0, 15.0, 2.5)}
    return exif.tobytes()


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:li tiff:Make="camera"/></x:xmpmeta>'


@dataclass(frozen=True)
class Metadata:
    exif: bytes
    icc: bytes
    xmp: bytes
    text: bytes


def jpeg_with(data: bytes, metadata: Metadata) -> bytes:
    payloads = (
        (0xE1, metadata.exif),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + metadata.xmp),
        (0xE2, b"ICC_PROFILE\0\x01\x01" + metadata.icc),
        (0xE2, b"MPF\0" + metadata.text),
        (0xED, b"Photoshop 3.0\0" + metadata.text),
        (0xFE, metadata.text),
    )
    blocks = [struct.pack(">BBH", 0xFF, marker, 2 + len(body[:65_533])) + body[:65_533] for marker, body in payloads]
    return data[:2] + b"".join(blocks) + data[2:]


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_with(data: bytes, metadata: Metadata) -> bytes:
    blocks = [
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(metadata.icc)),
        chunk(b"eXIf", metadata.exif.removeprefix(b"Exif\0\0")),
        chunk(b"pHYs", metadata.text[:9]),
        chunk(b"tEXt", b"Comment\0" + metadata.text),
        chunk(b"zTXt", b"Comment\0\0" + metadata.text),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + metadata.xmp),
        chunk(b"tRNS", metadata.text),
    ]
    return data[:33] + b"".join(blocks) + data[33:]


def webp_with(data: bytes, metadata: Metadata) -> bytes:
    size_px = struct.unpack("<HH", data[26:30])
    extended = bytes([0x2C, 0, 0, 0]) + b"".join((side - 1).to_bytes(3, "little") for side in size_px)
    blocks = [(b"VP8X", extended), (b"ICCP", metadata.icc), (data[12:16], data[20:])]
    blocks += [(b"EXIF", metadata.exif), (b"XMP ", metadata.xmp)]
    body = b"WEBP" + b"".join(
        name + struct.pack("<I", len(block)) + block + b"\0" * (len(block) % 2) for name, block in blocks
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


KINDS: dict[str, tuple[bytes, Callable[[bytes, Metadata], bytes]]] = {
    "JPEG": (saved(picture(), "JPEG", quality=85), jpeg_with),
    "progressive JPEG": (saved(picture(), "JPEG", quality=85, progressive=True), jpeg_with),
    "CMYK JPEG": (saved(picture().convert("CMYK"), "JPEG"), jpeg_with),
    "PNG": (saved(picture(), "PNG"), png_with),
    "palette PNG": (saved(picture().convert("P"), "PNG"), png_with),
    "WEBP": (saved(picture(), "WEBP", quality=85), webp_with),
}


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Damage of any kind: bytes changed, cut, repeated, replaced, made huge."""
    changed = bytearray(data)
    for _ in range(rng.randint(0, 8)):
        if changed:
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    match rng.randrange(6):
        case 0:
            del changed[rng.randrange(len(changed) + 1) :]
        case 1:
            changed += rng.randbytes(rng.randrange(300))
        case 2:
            changed = bytearray(rng.randbytes(rng.randrange(200)))
        case 3:
            changed += bytes(rng.choice([1, 70_000, 1 << 21]))
        case _:
            pass
    return bytes(changed)


def turned(pixels: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """All ways to turn and mirror pixels."""
    return [np.rot90(side, number) for side in (pixels, pixels[:, ::-1]) for number in range(4)]


def fuzz_metadata(seed: int, number: int) -> None:
    """Pixels are those of the photo without metadata; a damaged EXIF block may still say another orientation."""
    rng, sound = random.Random(seed), Metadata(exif_block(), b"an ICC profile" * 9, XMP, b"some text")
    plain = {
        (kind, scaled): images.decode(data, SIDE_PX, scaled_decoding=scaled)
        for kind, (data, _) in KINDS.items()
        for scaled in (False, True)
    }
    for _ in range(number):
        kind, scaled = rng.choice(list(KINDS)), rng.random() < 0.5
        exif, xmp = sound.exif, sound.xmp
        if rng.random() < 0.5:
            exif, xmp = mutated(rng, exif), mutated(rng, xmp)
        icc, text = mutated(rng, sound.icc), mutated(rng, sound.text)
        photo = KINDS[kind][1](KINDS[kind][0], Metadata(exif, icc, xmp, text))
        found, expected = images.decode(photo, SIDE_PX, scaled_decoding=scaled), plain[kind, scaled]
        if (exif, xmp) == (sound.exif, sound.xmp):
            np.testing.assert_array_equal(found, expected, err_msg=kind)
        else:
            assert any(np.abs(found.astype(int) - one).max() <= 24 for one in turned(expected)), kind


def test_metadata_never_decides_about_pixels() -> None:
    fuzz_metadata(7, NUM_SHORT)


@pytest.mark.soak
def test_metadata_never_decides_about_pixels_at_length() -> None:
    fuzz_metadata(8, NUM_LONG)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_sane_orientation_holds_beside_garbage(kind: str, scaled: bool) -> None:
    data, with_metadata = KINDS[kind]
    garbage = Metadata(exif_block(3), bytes(1 << 21), b"\xff" * 99, b"\0\xff" * 30_000)
    found = images.decode(with_metadata(data, garbage), SIDE_PX, scaled_decoding=scaled)
    plain = images.decode(data, SIDE_PX, scaled_decoding=scaled)
    assert np.abs(found[::-1, ::-1].astype(int) - plain).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_gps_fractions_of_zero_do_not_matter(kind: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    exif[GPS] = {2: (IFDRational(0, 0),) * 3, 4: (IFDRational(1, 0),) * 3}
    options: dict[str, object] = {"lossless": True} if kind == "WEBP" else {}
    found = images.decode(saved(picture(), kind, exif=exif.tobytes(), **options), SIDE_PX)
    plain = images.decode(saved(picture(), kind, **options), SIDE_PX)
    assert np.abs(found[::-1, ::-1].astype(int) - plain).max() <= 1


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "AVIF"])
def test_further_kinds_are_read(kind: str) -> None:
    found = images.decode(saved(picture(), kind), SIDE_PX)
    assert np.abs(found.astype(int) - images.decode(saved(picture(), "PNG"), SIDE_PX)).mean() < 12


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_of_several_pictures_the_first_is_the_photo(kind: str) -> None:
    other = Image.new("RGB", picture().size, "red")
    options: dict[str, object] = {"lossless": True} if kind == "WEBP" else {}
    several = saved(picture(), kind, save_all=True, append_images=[other], **options)
    alone = saved(picture(), "JPEG" if kind == "MPO" else kind, **options)
    np.testing.assert_array_equal(images.decode(several, SIDE_PX), images.decode(alone, SIDE_PX))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}, {"subsampling": 2}])
@pytest.mark.parametrize("cut", [1, 2])
def test_a_jpeg_without_its_end_marker_is_whole(options: dict[str, object], cut: int) -> None:
    data = saved(picture(), "JPEG", **options)
    found = images.decode_pixels(data[:-cut], SIDE_PX)
    np.testing.assert_array_equal(found.rgb, images.decode(data, SIDE_PX))
    assert (found.remark, images.decode_pixels(data, SIDE_PX).remark) == (images.NO_END, None)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}])
@pytest.mark.parametrize("padding", [0, 5000])
def test_a_jpeg_that_lacks_pixels_is_broken_wherever_it_is_cut(options: dict[str, object], padding: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    data = saved(Image.fromarray(noise), "JPEG", **options)
    for stop in (*range(len(data) // 3, len(data) - 8, 37), *range(len(data) - 24, len(data) - 8)):
        with pytest.raises(images.BrokenImageError, match="truncated"):
            images.decode(data[:stop] + bytes(padding), SIDE_PX)


def test_16_bits_of_a_narrow_range_are_named() -> None:
    values = np.linspace(7000, 7800, 64 * 64).reshape(64, 64).astype(np.uint16)
    remark = images.decode_pixels(saved(Image.fromarray(values), "PNG"), SIDE_PX).remark
    assert remark is not None
    assert remark.startswith(
        f"{images.NARROW}: values 7,000 to 7,800 of 0 to 65,535 become shades 27 to 30 of 0 to 255"
    )
    wide = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    assert images.decode_pixels(saved(Image.fromarray(wide), "PNG"), SIDE_PX).remark is None


@pytest.mark.parametrize("values", [np.ones((8, 8), np.float32), np.full((8, 8), 1 << 20, np.int32)])
def test_values_of_no_common_range_are_refused(values: NDArray[np.generic]) -> None:
    with pytest.raises(images.BrokenImageError, match=r"expected .*8 or 16 bits"):
        images.decode(saved(Image.fromarray(values), "TIFF"), SIDE_PX)


def bomb(kind: str, side_px: int = 16_000) -> bytes:
    """A small file of many pixels, or of text that unpacks to gigabytes."""
    if kind == "WEBP":
        extended = bytes(4) + (16_382).to_bytes(3, "little") * 2
        return b"RIFF" + struct.pack("<I", 26) + b"WEBPVP8X" + struct.pack("<I", 10) + extended + b"VP8L"
    if kind == "PNG text":
        text = chunk(b"zTXt", b"XML:com.adobe.xmp\0\0" + zlib.compress(bytes(200 << 20)))
        data = KINDS["PNG"][0]
        return data[:33] + text + data[33:]
    header = struct.pack(">IIBBBBB", side_px, side_px, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(side_px * (side_px // 8 + 1)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


PEAK = """
import io, sys
from PIL import Image
from pairvpr.data import images


def resident_bytes(name):
    # VmRSS, or VmHWM: its peak since it was cleared. The peak that getrusage knows is at first that of the parent.
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024


warm = io.BytesIO()
Image.new("RGB", (8, 8)).save(warm, "PNG")
images.decode(warm.getvalue(), 14)
for name in sys.argv[2:]:
    data = open(name, "rb").read()
    open("/proc/self/clear_refs", "w").write("5")
    before = resident_bytes("VmRSS")
    try:
        images.decode(data, 14, max_megapixels=float(sys.argv[1]))
    except images.BrokenImageError as error:
        print(error, file=sys.stderr)
    print(resident_bytes("VmHWM") - before)
"""


def peaks_bytes(files: Sequence[Path], max_megapixels: float) -> list[int]:
    """By how much a process grows while it decodes each file."""
    command = [sys.executable, "-c", PEAK, str(max_megapixels), *map(str, files)]
    done = subprocess.run(
        command, capture_output=True, check=True, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    )
    return [int(line) for line in done.stdout.split()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "side_px", "max_megapixels", "most_bytes"),
    [
        ("WEBP", 0, 180.0, 16 << 20),
        ("PNG", 16_000, 180.0, 16 << 20),
        ("PNG text", 0, 180.0, 32 << 20),
        ("PNG", 4_000, 16.0, 16 * 16_000_000),
    ],
)
def test_the_limit_bounds_memory(
    tmp_path: Path, kind: str, side_px: int, max_megapixels: float, most_bytes: int
) -> None:
    (tmp_path / "bomb").write_bytes(bomb(kind, side_px))
    (peak_bytes,) = peaks_bytes([tmp_path / "bomb"], max_megapixels)
    assert peak_bytes <= most_bytes


MOST_BYTES_PER_PIXEL, MOST_BYTES_PER_PIXEL_OF_WEBP, MOST_COPIES_OF_THE_FILE = 16, 28, 4
SAVED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "JPEG": ("JPEG", "RGB", {}),
    "progressive JPEG": ("JPEG", "RGB", {"progressive": True, "subsampling": 0, "quality": 98}),
    "progressive CMYK": ("JPEG", "CMYK", {"progressive": True}),
    "PNG": ("PNG", "RGB", {"compress_level": 1}),
    "PNG of 16 bits": ("PNG", "I;16", {"compress_level": 1}),
    "PNG with alpha": ("PNG", "RGBA", {"compress_level": 1}),
    "WebP": ("WEBP", "RGB", {"method": 0}),
    "lossless WebP": ("WEBP", "RGBA", {"lossless": True, "method": 0}),
    "AVIF": ("AVIF", "RGB", {"speed": 10}),
    "AVIF with alpha": ("AVIF", "RGBA", {"speed": 10, "subsampling": "4:4:4"}),
    "TIFF": ("TIFF", "RGB", {}),
    "packed TIFF": ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    "BMP": ("BMP", "RGB", {}),
    "GIF": ("GIF", "P", {}),
}


@pytest.mark.slow
def test_decoding_takes_the_documented_memory(tmp_path: Path) -> None:
    """Photos that lie on their side, of every format; a JPEG without its end marker, too, which is decoded twice."""
    side_px, exif = 1600, Image.Exif()
    exif[ORIENTATION] = 6
    noise = np.random.default_rng(0).integers(0, 256, (side_px // 4, side_px // 4, 3), np.uint8)
    photo = Image.fromarray(noise).resize((side_px, side_px))
    files = []
    for name, (kind, mode, options) in SAVED.items():
        image = photo.convert("L").convert("I").convert("I;16") if mode == "I;16" else photo.convert(mode)
        image.save(tmp_path / name, kind, **options, **({"exif": exif} if kind not in ("BMP", "GIF") else {}))
        files.append(tmp_path / name)
    files.append(tmp_path / "progressive JPEG without end")
    files[-1].write_bytes((tmp_path / "progressive JPEG").read_bytes()[:-2])
    for file, peak_bytes in zip(files, peaks_bytes(files, 3.0), strict=True):
        per_pixel = MOST_BYTES_PER_PIXEL_OF_WEBP if "WebP" in file.name else MOST_BYTES_PER_PIXEL
        assert peak_bytes < per_pixel * side_px**2 + MOST_COPIES_OF_THE_FILE * file.stat().st_size, file.name
        assert peak_bytes > 3 * side_px**2, file.name  # else nothing was decoded, or measured


@pytest.mark.parametrize("is_file", [False, True])
def test_the_limit_holds_for_a_photo_that_somebody_hands_over(tmp_path: Path, is_file: bool) -> None:
    data = saved(picture(1000, 1001), "PNG")
    (tmp_path / "a.png").write_bytes(data)
    photo = Asked(str(tmp_path / "a.png") if is_file else data)
    with pytest.raises(PhotoError, match=r"1\.0 megapixels, more than model\.max_megapixels=1"):
        photo.pixels(ModelConfig(image_size_px=SIDE_PX, max_megapixels=1))
    np.testing.assert_array_equal(photo.pixels(ModelConfig(image_size_px=SIDE_PX)), images.decode(data, SIDE_PX))


def test_pillows_own_limit_is_never_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    before, data = Image.MAX_IMAGE_PIXELS, saved(picture(40, 30), "JPEG")
    images.decode(data, SIDE_PX)
    assert before == Image.MAX_IMAGE_PIXELS
    images.decode(data, SIDE_PX, max_megapixels=400)
    assert Image.MAX_IMAGE_PIXELS == 200_000_000


@pytest.mark.slow
@needs_shared
def test_the_shared_panorama_is_read_with_a_larger_limit() -> None:
    data = (SHARED / "cases" / "pano_16k" / "db" / "pano.png").read_bytes()
    with pytest.raises(images.BrokenImageError, match=r"20,992 x 10,496 .* more than model\.max_megapixels=178"):
        images.decode(data, SIDE_PX)
    assert images.decode(data, SIDE_PX, max_megapixels=221).shape == (SIDE_PX, SIDE_PX, 3)


@needs_shared
@pytest.mark.parametrize(
    ("case", "remark"), [("png_big_profile", None), ("jpeg_no_eoi", images.NO_END), ("thermal_16bit", images.NARROW)]
)
def test_the_shared_cases_are_read(case: str, remark: str | None) -> None:
    paths = sorted((SHARED / "cases" / case).glob("*/*.*g"))
    found = [images.decode_pixels(path.read_bytes(), SIDE_PX).remark for path in paths]
    assert len(found) >= 9
    assert {None if text is None else text.split(":")[0] for text in found} <= {None, remark}
    assert remark is None or any(found)
