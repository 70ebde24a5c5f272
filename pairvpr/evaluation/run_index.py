"""The photos that the ids of a finished run stand for: those of the index that it searched. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pairvpr.data import storage
from pairvpr.data.manifest import Manifest
from pairvpr.errors import UserError
from pairvpr.index.generations import IndexManifest, read_images, read_manifest
from pairvpr.secrets import HIDDEN

DIGEST_LENGTH = 12


def index_places(url: str, settings: Mapping[str, Any]) -> list[str]:
    """Where the index of the run in `url` may be: beside the run, which may have been moved, or where it was made.

    A recorded URL whose password was masked can't be opened, and is left out.
    """
    places = [storage.join(storage.absolute(url), "index")]
    index = settings.get("index")
    made_in = index.get("path") if isinstance(index, Mapping) else None
    if isinstance(made_in, str) and HIDDEN not in made_in:
        places.append(storage.absolute(made_in))
    return list(dict.fromkeys(places))


def photos_of_run(url: str, settings: Mapping[str, Any], protocol: Mapping[str, Any]) -> Manifest | None:
    """The photos of the index that the run in `url` searched, removed ones too; None if no index is there.

    `settings` are those of its settings.json, `protocol` that of its metrics.json. An index may hold more photos by
    now: those that were added have later ids, and are left out.

    Raises `UserError`, naming the run and each index, if there are only indices of other photos.
    """
    others = []
    for place in index_places(url, settings):
        manifest = read_manifest(place)
        if manifest is None:
            continue
        found = _photos_if_same(place, manifest, settings, protocol)
        if isinstance(found, Manifest):
            return found
        others.append(f"{place} ({found})")
    if not others:
        return None
    raise UserError(
        f"{url}: its answers are ids of another index's photos than those of {' and '.join(others)}; expected the "
        f"index that the run searched, in {storage.join(url, 'index')} or where it was made"
    )


def _photos_if_same(
    directory: str, manifest: IndexManifest, settings: Mapping[str, Any], protocol: Mapping[str, Any]
) -> Manifest | str:
    """The photos that a run's ids stand for, or in words why an index does not have them.

    What an earlier version did not record is not compared.
    """
    number, digest = protocol.get("num_database"), protocol.get("database_paths_sha256")
    database = settings.get("database")
    root = database.get("root") if isinstance(database, Mapping) else None
    if isinstance(number, int) and manifest.num_images < number:
        return f"{manifest.num_images:,} photos, the run had {number:,}"
    if root is not None and root != manifest.images_root:
        return f"photos of {manifest.images_root}, the run's were in {root}"
    photos = read_images(directory, manifest)
    if isinstance(number, int):
        photos = Manifest(photos.root, photos.table.slice(0, number))
    if digest is not None and photos.paths_sha256 != digest:
        here, there = photos.paths_sha256[:DIGEST_LENGTH], str(digest)[:DIGEST_LENGTH]
        return f"paths with the sha256 {here}, those of the run have {there}"
    return photos
