"""Strips metadata from a photo's file, leaving only the bytes that decide its pixels.

Metadata is everything that pixels do not need: ICC profiles, EXIF, XMP, text, thumbnails, further pictures. It may be
damaged, huge, or decompress to gigabytes, while the pixels are intact. Only the orientation is read from it. A file
with a damaged structure is left unchanged: its decoder reports what is wrong.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image
from PIL.ExifTags import Base

UPRIGHT = 1
_MOST_UNPACKED_BYTES = 1 << 20
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_EXIF_HEADER, _XMP_HEADER = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_RAW_EXIF, _XMP_IN_PNG = b"Raw profile type exif", b"XML:com.adobe.xmp"
_PLAIN_JFIF = b"JFIF\0\x01\x01\0\0\x01\0\x01\0\0"
_ADOBE_BYTES = 12
_WEBP_PIXELS = {b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF"}
_WEBP_METADATA_FLAGS = 0x20 | 0x08 | 0x04
_TIFF_PIXELS = frozenset(
    {*range(254, 260), 262, 263, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, *range(322, 326)}
    | {332, 334, *range(338, 342), 347, *range(512, 522), *range(529, 533)}
)
"""Tags that describe how pixels are stored, and the orientation."""


@dataclass(frozen=True)
class PhotoFile:
    """`pixels`: the file without metadata; `orientation`: 1 to 8 as in EXIF, 1 if there is no valid one.

    A TIFF keeps its orientation tag, which Pillow applies.
    """

    pixels: bytes
    orientation: int = UPRIGHT


def without_metadata(data: bytes) -> PhotoFile:
    """Split a photo's file; unknown kinds of files stay whole."""
    if data.startswith(b"\xff\xd8"):
        return _jpeg(data)
    if data.startswith(_PNG_SIGNATURE):
        return _png(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp(data)
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return PhotoFile(_tiff(data))
    return PhotoFile(data)


def with_exif_alone(data: bytes) -> bytes:
    """A PNG without its ICC profile and its texts other than EXIF; other files unchanged.

    Pillow refuses a PNG whose profile or texts decompress to more than a mebibyte.
    """
    if not data.startswith(_PNG_SIGNATURE):
        return data
    kept, stop = [_PNG_SIGNATURE], len(_PNG_SIGNATURE)
    for name, start, stop in _png_chunks(data):
        is_exif = data[start + 8 : stop].startswith(_RAW_EXIF + b"\0")
        if name != b"iCCP" and (name not in _PNG_TEXTS or is_exif):
            kept.append(data[start:stop])
    return b"".join([*kept, data[stop:]])


def webp_size_px(data: bytes) -> tuple[int, int] | None:
    """Width and height in a WebP's header; its decoder allocates memory for them on opening."""
    kind, head = data[12:16], data[20:30]
    if not (data.startswith(b"RIFF") and data[8:12] == b"WEBP" and len(head) == 10):
        return None
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[4:7], "little"), 1 + int.from_bytes(head[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        return int.from_bytes(head[6:8], "little") & 0x3FFF, int.from_bytes(head[8:10], "little") & 0x3FFF
    return None


def orientation_of(image: Image.Image) -> int:
    """The orientation of an image opened by Pillow: 1 to 8, and 1 if there is no valid one."""
    try:
        return _sane(image.getexif().get(Base.Orientation))
    except Exception:  # Pillow raises nearly anything on foreign bytes
        return UPRIGHT


def _sane(orientation: object) -> int:
    return orientation if isinstance(orientation, int) and UPRIGHT <= orientation <= 8 else UPRIGHT


def _orientation(exif: bytes, xmp: bytes) -> int:
    """The orientation from an EXIF block or, without one, from XMP."""
    try:
        block = Image.Exif()
        block.load(exif)
        value = block.get(Base.Orientation)
    except Exception:  # Pillow raises nearly anything on foreign bytes
        value = None
    if value is None and (found := _XMP_ORIENTATION.search(xmp)):
        value = int(found[1])
    return _sane(value)


def _jpeg(data: bytes) -> PhotoFile:
    """Strip a JPEG: before the first scan, keep only tables and the two markers for the colour encoding."""
    kept, exif, xmp, at = [data[:2]], b"", b"", 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, stop = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker in (0x00, 0x01, 0xDA) or 0xD0 <= marker <= 0xD9 or not at + 4 <= stop <= len(data):
            break
        payload = data[at + 4 : stop]
        if marker == 0xE0 and payload.startswith(b"JFIF\0") and len(payload) >= len(_PLAIN_JFIF):
            kept.append(_jpeg_segment(marker, _PLAIN_JFIF))
        elif marker == 0xEE and payload.startswith(b"Adobe") and len(payload) >= _ADOBE_BYTES:
            kept.append(_jpeg_segment(marker, payload[:_ADOBE_BYTES]))
        elif marker == 0xE1:
            exif = exif or (payload if payload.startswith(_EXIF_HEADER) else b"")
            xmp = payload if payload.startswith(_XMP_HEADER) else xmp
        elif not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(data[at:stop])
        at = stop
    return PhotoFile(b"".join([*kept, data[at:]]), _orientation(exif, xmp))


def _jpeg_segment(marker: int, payload: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, 2 + len(payload)) + payload


def _png(data: bytes) -> PhotoFile:
    """Strip a PNG: keep only critical chunks, which exclude transparency, since pixels become RGB."""
    kept, exif, raw_exif, xmp, name, stop = [_PNG_SIGNATURE], b"", b"", b"", b"", len(_PNG_SIGNATURE)
    for name, start, stop in _png_chunks(data):
        if not name[0] & 0x20:
            kept.append(data[start:stop])
        elif name == b"eXIf":
            exif = _EXIF_HEADER + data[start + 8 : stop - 4]
        elif name in _PNG_TEXTS:
            keyword, _, text = data[start + 8 : stop - 4].partition(b"\0")
            raw_exif = _png_text(name, text) if keyword == _RAW_EXIF else raw_exif
            xmp = _png_text(name, text) if keyword == _XMP_IN_PNG else xmp
    rest = b"" if name == b"IEND" else data[stop:]
    return PhotoFile(b"".join([*kept, rest]), _orientation(exif or _from_hex(raw_exif), xmp))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of each complete chunk, up to the picture's last one."""
    at = len(_PNG_SIGNATURE)
    while at + 12 <= len(data):
        name, stop = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        if stop > len(data):
            return
        yield name, at, stop
        if name == b"IEND":
            return
        at = stop


def _png_text(name: bytes, text: bytes) -> bytes:
    """The text of a chunk, after its keyword; empty if it is damaged or decompresses to too much."""
    is_packed = name == b"zTXt" or (name == b"iTXt" and text[:1] == b"\x01")
    packed = {b"tEXt": lambda: text, b"zTXt": lambda: text[1:], b"iTXt": lambda: text[2:].split(b"\0", 2)[-1]}[name]()
    if not is_packed:
        return packed
    try:
        unpacking = zlib.decompressobj()
        unpacked = unpacking.decompress(packed, _MOST_UNPACKED_BYTES)
    except zlib.error:
        return b""
    return unpacked if unpacking.eof else b""


def _from_hex(raw: bytes) -> bytes:
    """The EXIF block that ImageMagick writes as text: three header lines, then hex digits."""
    try:
        return bytes.fromhex(b"".join(raw.split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return b""


def _webp(data: bytes) -> PhotoFile:
    chunks = list(_riff_chunks(data))
    if sum(8 + len(body) + len(body) % 2 for _, body in chunks) < min(len(data), _riff_stop(data)) - 12 - 1:
        return PhotoFile(data)  # a chunk that extends beyond the file
    metadata = {name: body for name, body in reversed(chunks) if name in (b"EXIF", b"XMP ")}
    pieces = [b"WEBP"]
    for name, body in chunks:
        if name in _WEBP_PIXELS:
            flags = [bytes([body[0] & ~_WEBP_METADATA_FLAGS]), body[1:]] if name == b"VP8X" and body else [body]
            pieces += [name, struct.pack("<I", len(body)), *flags, b"\0" * (len(body) % 2)]
    kept = b"".join(pieces)
    orientation = _orientation(metadata.get(b"EXIF", b""), metadata.get(b"XMP ", b""))
    return PhotoFile(b"RIFF" + struct.pack("<I", len(kept)) + kept, orientation)


def _riff_stop(data: bytes) -> int:
    return 8 + int.from_bytes(data[4:8], "little")


def _riff_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at, stop = 12, min(len(data), _riff_stop(data))
    while at + 8 <= stop:
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if at + 8 + size > stop:
            return
        yield data[at : at + 4], data[at + 8 : at + 8 + size]
        at += 8 + size + size % 2


def _tiff(data: bytes) -> bytes:
    """Strip a TIFF: replace the first picture's tags by those that its pixels need."""
    order = "<" if data.startswith(b"II") else ">"
    is_big = data[2:4] in (b"+\0", b"\0+")
    entry_bytes, number = (20, "Q") if is_big else (12, "H")
    offset_number = "Q" if is_big else "I"
    try:
        (first,) = struct.unpack_from(order + offset_number, data, 8 if is_big else 4)
        (count,) = struct.unpack_from(order + number, data, first)
    except struct.error:
        return data
    start = first + struct.calcsize(number)
    entries = data[start : start + count * entry_bytes]
    stop = start + len(entries) + struct.calcsize(offset_number)
    if len(entries) != count * entry_bytes or stop > len(data):
        return data
    pieces = [entries[at : at + entry_bytes] for at in range(0, len(entries), entry_bytes)]
    needed = [piece for piece in pieces if struct.unpack_from(order + "H", piece)[0] in _TIFF_PIXELS]
    directory = struct.pack(order + number, len(needed)) + b"".join(needed)
    return data[:first] + directory.ljust(stop - first, b"\0") + data[stop:]
