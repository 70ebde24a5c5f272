"""Thumbnails of an index's photos, and of nothing else; and why a photo was found."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from pairvpr.config.schema import ModelConfig
from pairvpr.data import images
from pairvpr.data.images import BrokenImageError
from pairvpr.deadline import Deadline
from pairvpr.localizer import Localizer
from pairvpr.opened import Generation
from pairvpr.report.thumbnails import heat_uri
from pairvpr.serving.body import broken, check_photo
from pairvpr.serving.errors import RequestError, not_found
from pairvpr.serving.schema import Why
from pairvpr.serving.service import Service

SIDE_PX = 512
QUALITY = 80


async def thumbnail(service: Service, name: str | None, photo_id: int, deadline: Deadline) -> bytes:
    """A WebP picture of a photo of the index, at most `SIDE_PX` on its longer side. Raises `RequestError`."""
    localizer = service.localizer(name)
    opened = localizer.opened

    def work() -> bytes:
        photo = _upright(_read(opened, photo_id), photo_id, localizer.network)
        photo.thumbnail((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS, reducing_gap=3.0)
        file = io.BytesIO()
        photo.save(file, "WEBP", quality=QUALITY, method=2)
        return file.getvalue()

    return await service.computed(service.picturing, work, deadline)


async def why(service: Service, name: str | None, photo_id: int, query: bytes, deadline: Deadline) -> Why:
    """Where the pair decoder looks in the query photo and in a photo of the index. Raises `RequestError`."""
    localizer = service.localizer(name)

    def work() -> Why:
        check_photo(query, service.max_megapixels)
        return _why(localizer, localizer.opened, photo_id, query, deadline)

    return await service.computed(service.answering, work, deadline)


def _why(localizer: Localizer, opened: Generation, photo_id: int, query: bytes, deadline: Deadline) -> Why:
    """The network takes the files, and decodes them as it does for a candidate's score; the maps need their sizes."""
    try:
        query_px = images.decode_upright(query, max_megapixels=localizer.network.max_megapixels).size
    except BrokenImageError as error:
        raise broken(str(error)) from error
    photo = _read(opened, photo_id)
    photo_px = _upright(photo, photo_id, localizer.network).size
    explained = localizer.explained(query, photo, deadline=deadline)
    return Why(
        query=heat_uri(explained.over_photo, query_px),
        photo=heat_uri(explained.over_other, photo_px),
        pair_score=explained.pair_score,
    )


def _read(opened: Generation, photo_id: int) -> bytes:
    """The file of a photo of the index. Raises `RequestError` (404) if it is gone, or another one now."""
    if not 0 <= photo_id < len(opened.photos) or photo_id in opened.removed:
        raise not_found(f"photo {photo_id}: the index has no such photo")
    if len(opened.described.changed(np.array([photo_id]))):
        raise not_found(f"photo {photo_id}: it has changed since it was described")
    try:
        return images.read(opened.photos.url(photo_id))
    except BrokenImageError as error:
        raise _unreadable(photo_id) from error


def _upright(photo: bytes, photo_id: int, network: ModelConfig) -> Image.Image:
    """A photo of the index, of as many pixels as the network takes. Raises `RequestError` (404) if it is broken."""
    try:
        return images.decode_upright(photo, max_megapixels=network.max_megapixels)
    except BrokenImageError as error:
        raise _unreadable(photo_id) from error


def _unreadable(photo_id: int) -> RequestError:
    return not_found(f"photo {photo_id}: it can't be read any more")
