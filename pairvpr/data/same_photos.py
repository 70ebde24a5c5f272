"""Queries that are database photos, too: each finds itself, and the recall says nothing."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict

from pairvpr.data import storage
from pairvpr.data.manifest import Manifest

MOST_DATABASE_PHOTOS = 200_000
"""A larger database is not searched: to ask a disk of a network for the sizes of millions of files takes minutes."""


def same_photos(queries: Manifest, database: Manifest) -> list[tuple[int, int]]:
    """Pairs of a query and the first database photo with the same bytes, in the order of the queries.

    Reads files of equal size alone. Empty where either is on a store, and for more than `MOST_DATABASE_PHOTOS`.
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
    """In bytes; 0 for what is not there, which others report."""
    try:
        return os.stat(storage.local_path(url)).st_size
    except OSError:
        return 0


def _digest(url: str) -> str:
    """Empty for what can't be read."""
    try:
        return hashlib.sha256(storage.read_bytes(url)).hexdigest()
    except OSError:
        return ""
