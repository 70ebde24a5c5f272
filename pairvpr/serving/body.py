"""The body of a request: photos and fields, read within bounds of bytes and time and kept in memory."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from pairvpr.config.serve_schema import LimitsConfig
from pairvpr.data import images
from pairvpr.serving.errors import RequestError

PHOTO = "photo"
MULTIPART = "multipart/form-data"
MOST_FIELDS = 32


@dataclass
class Body:
    """The photos, in order, and the other fields of a multipart body."""

    photos: list[bytes]
    fields: dict[str, str] = field(default_factory=dict)


class _InMemory(MultiPartParser):
    """Photos never touch the disk; the whole body is bounded before."""

    spool_max_size = 0  # `SpooledTemporaryFile` takes it as "never"


async def read_body(request: Request, limits: LimitsConfig) -> Body:
    """The photos and fields of a request. Raises `RequestError`: 400, 408, 413, 415."""
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            data = await _bytes_of(request, limits.max_body_bytes)
    except ClientDisconnect as error:
        raise RequestError(400, "hung_up", "the client hung up before the end of the body") from error
    except TimeoutError as error:
        why = f"the body took more than {limits.body_timeout_s:g} s (serve.body_timeout_s)"
        raise RequestError(408, "slow_body", why) from error
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != MULTIPART:
        if kind and not kind.startswith("image/") and kind not in ("application/octet-stream", _CURL):
            raise RequestError(415, "not_an_image", f"{_plain(kind)}: expected an image, or {MULTIPART} with `{PHOTO}`")
        return Body([data])
    return await _parts(request, data, limits)


_CURL = "application/x-www-form-urlencoded"
"""What `curl --data-binary` says of any body."""


async def _bytes_of(request: Request, most: int) -> bytes:
    declared = request.headers.get("content-length", "")
    too_large = RequestError(413, "too_large", f"the body has more than {most:,} bytes (serve.max_body_bytes)")
    if declared.isdecimal() and int(declared[:20]) > most:
        raise too_large
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > most:
            raise too_large
    return bytes(data)


async def _parts(request: Request, data: bytes, limits: LimitsConfig) -> Body:
    async def stream() -> AsyncIterator[bytes]:
        yield data

    parser = _InMemory(request.headers, stream(), max_files=limits.max_photos + 1, max_fields=MOST_FIELDS)  # pyright: ignore[reportArgumentType]
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        if "Too many files" in str(error):
            raise _too_many(limits) from error
        raise RequestError(
            400, "bad_multipart", "the multipart body can't be parsed; expected parts with names"
        ) from error
    body = Body([])
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name != PHOTO:
                raise RequestError(422, "bad_parameter", f"the file {_plain(name)!r}: expected `{PHOTO}`")
            body.photos.append(await value.read())
        elif name == PHOTO:
            raise RequestError(422, "bad_parameter", f"{PHOTO}: expected a file, with filename=")
        elif name in body.fields:
            raise RequestError(422, "bad_parameter", f"{_plain(name)} is given twice; expected it once")
        else:
            body.fields[name] = value
    if len(body.photos) > limits.max_photos:
        raise _too_many(limits)
    return body


def _too_many(limits: LimitsConfig) -> RequestError:
    return RequestError(413, "too_many_photos", f"more than {limits.max_photos} photos (serve.max_photos)")


def check_photo(photo: bytes, max_megapixels: float) -> None:
    """Raise `RequestError` (415, 422) for what is no image, and for one of too many pixels; nothing is decoded."""
    if not photo:
        raise RequestError(422, "broken_image", "the photo has no bytes; expected an image")
    try:
        width, height = images.size_px(photo)
    except images.ForeignFormatError as error:
        raise RequestError(415, "not_an_image", f"not an image: {error}") from error
    except images.BrokenImageError as error:
        raise broken(str(error)) from error
    if width * height > max_megapixels * 1e6 or not math.isfinite(width * height):
        raise RequestError(
            422,
            "too_many_pixels",
            f"{width:,} x {height:,} pixels are more than {max_megapixels:g} megapixels (serve.max_megapixels)",
        )


def broken(reason: str) -> RequestError:
    """422: the photo can't be decoded."""
    return RequestError(422, "broken_image", f"the image is broken: {_plain(reason)}")


def _plain(text: str) -> str:
    """One short printable line of what a client sent."""
    return "".join(char if char.isprintable() else "?" for char in text)[:160]
