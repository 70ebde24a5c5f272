"""JPEGs without an end marker: tells whether all pixels are nevertheless there.

A decoder that has read the last pixel ignores what follows. So a JPEG is complete if it gives the same pixels whatever
is appended, and truncated if appended bytes change its pixels.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from PIL import Image

END = b"\xff\xd9"
_PATTERNS = (b"\x00", b"\x55", b"\xaa", b"\x3c\xc9\x71\x0e")
_TAIL_BYTES = 256
_LEAST_PADDING = 4
"""This many zeros at the end of a file are preallocated by a download, and not pixels."""
_COEFFICIENTS = 64


def lacks_end(data: bytes) -> bool:
    """Whether these are the bytes of a JPEG that has pixel data but no end marker."""
    scans = data.find(b"\xff\xda") if data.startswith(b"\xff\xd8") else -1
    return scans >= 0 and data.find(END, scans) < 0


def with_end(data: bytes, decode: Callable[[bytes], Image.Image]) -> bytes | None:
    """The JPEG with its missing end marker added, or None if pixels are missing, too.

    `decode` gives the pixels of a JPEG at any scale; it is called nine times.
    """
    body = _without_padding(data)
    if not _is_refined(body):
        return None
    whole = decode(body + END).tobytes()
    if any(decode(body + tail + END).tobytes() != whole for tail in _tails(body)):
        return None
    return body + END


def _without_padding(data: bytes) -> bytes:
    """Strip preallocated zeros, and half of an end marker."""
    body = data.rstrip(b"\0")
    if len(data) - len(body) < _LEAST_PADDING:
        return data.removesuffix(b"\xff")
    return body + b"\0" if body.endswith(b"\xff") else body  # in a scan, a zero follows each 0xFF


def _tails(body: bytes) -> list[bytes]:
    """Bytes to append: more of the same restart interval, and further intervals."""
    num_restarts = len(re.findall(rb"\xff[\xd0-\xd7]", body[body.rfind(b"\xff\xda") :]))
    tails = []
    for pattern in _PATTERNS:
        bits = pattern * (_TAIL_BYTES // len(pattern))
        markers = [bytes([0xFF, 0xD0 + (num_restarts + number) % 8]) for number in range(16)]
        tails += [bits, b"".join(marker + bits for marker in markers)]
    return tails


def _is_refined(body: bytes) -> bool:
    """Whether a progressive JPEG has all scans, up to every coefficient's last bit; True for other JPEGs."""
    frame = _segment(body, rb"\xff\xc2")
    if frame is None:
        return True
    try:
        components = [frame[6 + 3 * number] for number in range(frame[5])]
        missing = {(component, place) for component in components for place in range(_COEFFICIENTS)}
        for match in re.finditer(rb"\xff\xda", body):
            scan = body[match.end() + 2 : match.end() + 16]
            number = scan[0]
            first, last, bits = scan[1 + 2 * number], scan[2 + 2 * number], scan[3 + 2 * number]
            if bits & 15 == 0:
                missing -= {(scan[1 + 2 * row], place) for row in range(number) for place in range(first, last + 1)}
    except IndexError:
        return False
    return not missing


def _segment(body: bytes, marker: bytes) -> bytes | None:
    found = re.search(marker, body[: body.find(b"\xff\xda")])
    return None if found is None else body[found.end() + 2 : found.end() + 32]
