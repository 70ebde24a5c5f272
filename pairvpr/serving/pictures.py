"""Thumbnails of an index's photos, and of nothing else; and why a photo was found."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from pairvpr.data import images
from pairvpr.data.images import BrokenImageError
from pairvpr.deadline import Deadline
from pairvpr.localizer import Localizer
from pairvpr.opened import Generation
from pairvpr.report.thumbnails import heat_uri
from pairvpr.serving.body import broken, check_photo
from pairvpr.serving.errors import not_found
from pairvpr.serving.schema import Why
from pairvpr.serving.service import Service

SIDE_PX = 512
QUALITY = 80


async def thumbnail(service: Service, name: str | None, photo_id: int, deadline: Deadline) -> bytes:
    """A WebP picture of a photo of the index, at most `SIDE_PX` on its longer side. Raises `RequestError`."""
    opened = service.localizer(name).opened

    def work() -> bytes:
        photo = _upright(opened, photo_id)
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
    try:
        shown = images.decode_upright(query, max_megapixels=localizer.network.max_megapixels)
    except BrokenImageError as error:
        raise broken(str(error)) from error
    photo = _upright(opened, photo_id)
    explained = localizer.explained(shown, photo, deadline=deadline)
    return Why(
        query=heat_uri(explained.over_photo, shown.size),
        photo=heat_uri(explained.over_other, photo.size),
        pair_score=explained.pair_score,
    )


def _upright(opened: Generation, photo_id: int) -> Image.Image:
    """A photo of the index as it was described. Raises `RequestError` (404) if it is gone, or another one now."""
    if not 0 <= photo_id < len(opened.photos) or photo_id in opened.removed:
        raise not_found(f"photo {photo_id}: the index has no such photo")
    if len(opened.described.changed(np.array([photo_id]))):
        raise not_found(f"photo {photo_id}: it has changed since it was described")
    try:
        return images.load_upright(opened.photos.url(photo_id))
    except BrokenImageError as error:
        raise not_found(f"photo {photo_id}: it can't be read any more") from error
