"""Finds queries that are also database photos: each finds itself, which makes the recall meaningless."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict

from pairvpr.data import storage
from pairvpr.data.manifest import Manifest

MOST_DATABASE_PHOTOS = 200_000
"""Larger databases are not searched: getting the sizes of millions of files takes minutes on a network disk."""


def same_photos(queries: Manifest, database: Manifest) -> list[tuple[int, int]]:
    """Pairs of a query and the first database photo with the same bytes, in query order.

    Reads only files of equal size. Empty if either folder is remote, and for more than `MOST_DATABASE_PHOTOS`.
    """
    roots_are_local = storage.is_local(queries.root) and storage.is_local(database.root)
    if not roots_are_local or len(database) > MOST_DATABASE_PHOTOS:
        return []
    of_size = defaultdict[int, list[int]](list)
    for image_id in range(len(database)):
        of_size[_size(database.url(image_id))].append(image_id)
    digests: dict[int, str] = {}
    found: list[tuple[int, int]] = []
    for query_id in range(len(queries)):
        size = _size(queries.url(query_id))
        candidates = of_size.get(size, []) if size > 0 else []
        if not candidates or not (digest := _digest(queries.url(query_id))):
            continue
        for image_id in candidates:
            if image_id not in digests:
                digests[image_id] = _digest(database.url(image_id))
            if digests[image_id] == digest:
                found.append((query_id, image_id))
                break
    return found


def _size(url: str) -> int:
    """Size in bytes; 0 for a missing file, which is reported elsewhere."""
    try:
        return os.stat(storage.local_path(url)).st_size
    except OSError:
        return 0


def _digest(url: str) -> str:
    """Digest of a file; empty if it can't be read."""
    try:
        return hashlib.sha256(storage.read_bytes(url)).hexdigest()
    except OSError:
        return ""
