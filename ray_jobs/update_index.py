"""`pairvpr update_index index.path=INDEX add=DIR remove=LIST.txt`: add and remove photos.

Each change is a new generation of the index.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray
from pyarrow import compute

from pairvpr.cli import run_job
from pairvpr.config.compose import load
from pairvpr.config.schema import UpdateIndexConfig
from pairvpr.data import stamps, storage
from pairvpr.data.claim import check_writable
from pairvpr.data.descriptor_file import check_photos_of_file
from pairvpr.data.located import located_as_in
from pairvpr.data.manifest import Manifest, folder_manifest
from pairvpr.data.photo_listing import IMAGE_SUFFIXES, photos_among
from pairvpr.data.problems import Problems
from pairvpr.data.spellings import NO_PHOTO, SEVERAL, Spellings, no_photo_text
from pairvpr.data.tables import TableFile
from pairvpr.distributed.describe import Description, describe, source_of
from pairvpr.distributed.index import RayRunner
from pairvpr.distributed.network import ModelSource
from pairvpr.distributed.runtime import ray_session
from pairvpr.errors import UserError
from pairvpr.index import choose, descriptor_shards
from pairvpr.index.generations import (
    IndexManifest,
    changed_meanwhile,
    commit,
    read_images,
    read_manifest,
)
from pairvpr.index.live import LivePhotos
from pairvpr.index.make import is_wanted, next_generation
from pairvpr.index.reader import removed_ids
from pairvpr.index.settings import index_settings
from pairvpr.index.update import UPDATES, compacted, remove_leftovers, with_added, without
from pairvpr.index.versions import are_there, photo_versions, write_versions
from pairvpr.models.weights import announce, load_weights
from pairvpr.status import published
from pairvpr.terminal import say
from ray_jobs.run import first_stage, open_manifest
from ray_jobs.steps import about_generation, memory_budget_bytes

pc: Any = compute  # its functions are generated at run time, so their types are unknown

LIST_SUFFIXES = (".txt", ".csv", ".parquet")


def main(arguments: Sequence[str]) -> None:
    """One change, one generation."""
    update_index(load(UpdateIndexConfig, arguments))


def update_index(config: UpdateIndexConfig) -> IndexManifest:
    """Add, remove, compact, or change the kind; returns the new generation, or the newest if nothing is left to do.

    Raises `UserError` before anything is written if the change is impossible, and at the end if another writer was
    faster; the index is then unchanged.
    """
    directory = storage.absolute(config.index.path)
    manifest = open_manifest(directory, config.index.path)
    _check_single_writer(directory, config.single_writer)
    check_writable(directory, "index.path")
    images = read_images(directory, manifest)
    removed = removed_ids(directory, manifest)
    named = _added(config, images)
    gone = _gone(config, images, removed, named)
    added, versions = named, pa.array([], pa.string())
    if named is not None:
        added, versions = _less_those_there(directory, manifest, removed, named)
        gone = _gone(config, images, removed, added)
    first, weights = first_stage(config)
    settings = index_settings(images if added is None else added, 1, first.settings)
    first.check_made(directory, manifest)
    if weights is not None:
        announce(config.model, weights)
    if first.file is not None and added is not None:
        check_photos_of_file(first.file, {"added": added}, "describe.descriptors")
    remove_leftovers(directory, manifest)
    if added is None and not len(gone) and not config.compact and config.index.kind is None:
        with published(directory, "update_index"):  # an update that was killed after its commit left another status
            say("update: finished earlier, nothing to change")
        return manifest
    prefix = _prefix(manifest, settings, gone, versions, config)
    with published(directory, "update_index"), ray_session(config.cluster):
        with _alone(directory, manifest):
            draft = replace(manifest, generation=manifest.generation + 1)
            threads, runner = config.index.num_build_threads, RayRunner()
            if added is not None:
                num_shards = config.index.num_shards or choose.default_num_shards(len(added))
                below = storage.join(directory, prefix.rstrip("/"))
                write_versions(below, added, versions)
                network = weights and ModelSource(config.model, ray.put(load_weights(config.model, weights)))
                rows = source_of(first, network)
                what = Description(added, below, num_shards, rows, config.describe, draft.num_images)
                describe(what, "added photos", needs_a_readable_photo=True)
                draft = with_added(directory, draft, prefix, added, num_shards, threads, runner)
                gone = _less_unreadable(gone, images, added, below)
            draft = _changed(config, directory, draft, prefix, gone, runner)
        if replace(draft, generation=manifest.generation) == manifest:
            say("update: finished earlier, nothing to change")
            return manifest
        commit(directory, draft)
    remove_leftovers(directory, draft)
    num_added = draft.num_images - manifest.num_images - (draft.num_rejected - manifest.num_rejected)
    num_gone = len(images.path_column.take(pa.array(gone)).unique())
    say(f"{about_generation(draft)}: {num_added:,} added, {num_gone:,} removed or replaced")
    return draft


def _changed(
    config: UpdateIndexConfig,
    directory: str,
    draft: IndexManifest,
    prefix: str,
    gone: NDArray[np.int64],
    runner: RayRunner,
) -> IndexManifest:
    """The draft without the photos that are gone, compacted and of another kind where that is wanted."""
    if len(gone):
        draft = without(directory, draft, prefix, gone)
    if config.compact:
        share, threads = config.index.compact_share, config.index.num_build_threads
        draft = compacted(directory, draft, prefix, share, threads, runner)
    options = config.index.as_build_config()
    if config.index.kind is not None and not is_wanted(draft, options):
        draft = next_generation(directory, draft, options, memory_budget_bytes(options), runner)
    return draft


def _check_single_writer(directory: str, single_writer: bool) -> None:
    if not single_writer and not storage.has_atomic_creation(directory):
        raise UserError(
            f"index.path={directory}: this storage may let two writers create the same generation, and one change "
            "would be lost; expected single_writer=true to confirm that nobody else changes this index now"
        )


def _prefix(
    manifest: IndexManifest,
    settings: dict[str, object],
    gone: NDArray[np.int64],
    versions: pa.Array,
    config: UpdateIndexConfig,
) -> str:
    """The folder for this change's files. Different changes never share one; the same change finds it again."""
    cut = [config.index.num_shards, config.index.num_build_threads, config.index.compact_share]
    about = [
        manifest.generation,
        settings,
        cut,
        versions.to_pylist(),
        hashlib.sha256(gone.tobytes()).hexdigest(),
    ]
    token = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
    return f"{UPDATES}/{manifest.generation + 1:06d}-{token}/"


def _added(config: UpdateIndexConfig, images: Manifest) -> Manifest | None:
    """The photos to add, by their paths below the root of the index's photos, with positions where it has some."""
    if config.add is None:
        return None
    if config.add.lower().endswith(LIST_SUFFIXES):
        paths = _as_spelt_there(_listed(config.add, "add", images.root), images.root)
    else:
        folder = _below_root(config.add, "add", images.root)
        paths = [f"{folder}{path}" for path in folder_manifest(config.add, "add").paths]
    added = Manifest.of(images.root, sorted(set(paths)))
    return added if config.without_positions else located_as_in(images, added, config, "add", config.add)


def _as_spelt_there(paths: Sequence[str], root: str) -> list[str]:
    """The listed paths; those of no file as the one photo is spelt that they stand for, if there is one.

    Raises `UserError` where there are several. The folder is listed only if some file is not there.
    """
    is_missing = pc.is_null(stamps.stamps_of(Manifest.of(root, paths), np.arange(len(paths)))).to_numpy()
    if not is_missing.any():
        return list(paths)
    there = photos_among(storage.list_files(root)).photos
    spellings, spelt = Spellings(there), list(paths)
    for i in np.flatnonzero(is_missing).tolist():
        place = spellings.find(paths[i])
        if place == SEVERAL:
            raise UserError(f"add: {no_photo_text(paths[i], place, root)}")
        spelt[i] = paths[i] if place == NO_PHOTO else there[place]
    return spelt


def _less_those_there(
    directory: str, manifest: IndexManifest, removed: NDArray[np.int64], named: Manifest
) -> tuple[Manifest | None, pa.Array]:
    """The photos that the index lacks in their present version, and their versions; no manifest if it has all."""
    versions = photo_versions(named)
    is_new = ~are_there(directory, manifest, removed, named, versions)
    if not is_new.all():
        say(f"update: {(~is_new).sum():,} of {len(named):,} photos to add are already in the index")
    new = named.take(np.flatnonzero(is_new))
    return new if len(new) else None, versions.filter(pa.array(is_new))


@contextmanager
def _alone(directory: str, manifest: IndexManifest) -> Iterator[None]:
    """If the block fails because a faster writer has deleted this one's files, say so."""
    try:
        yield
    except Exception as error:
        newest = read_manifest(directory)
        if newest is None or newest.generation == manifest.generation:
            raise
        raise changed_meanwhile(directory, newest.generation) from error


def _gone(
    config: UpdateIndexConfig, images: Manifest, removed: NDArray[np.int64], added: Manifest | None
) -> NDArray[np.int64]:
    """Ids to remove, ascending: those of `remove`, and all whose paths are added again."""
    live = LivePhotos(images, removed)
    gone = [np.empty(0, np.int64)]
    if config.remove is not None:
        gone.append(_found(config.remove, live))
    if added is not None:
        again = live.ids_at(added.path_column)
        both = np.intersect1d(gone[-1], again)
        if len(both):
            raise UserError(f"add and remove both name {images.path(int(both[0]))}; expected each photo in one of them")
        gone.append(again)
    return np.unique(np.concatenate(gone))


def _found(remove: str, live: LivePhotos) -> NDArray[np.int64]:
    """Live ids of the photos that `remove` names; those removed earlier have none."""
    root = live.images.root
    if remove.lower().endswith(LIST_SUFFIXES):
        names = pa.chunked_array([pa.array(_listed(remove, "remove", root), pa.string())])
        ids, found = live.ids_named(names)
        unknown = names.filter(pa.array(found == NO_PHOTO))
        if len(unknown):
            raise UserError(
                f"remove={remove}: {unknown[0]} is not in the index ({len(unknown) - 1:,} more are not, either); "
                f"expected paths relative to {root}"
            )
        several = np.flatnonzero(found == SEVERAL)
        if len(several):
            raise UserError(f"remove={remove}: {no_photo_text(names[int(several[0])].as_py(), SEVERAL, root)}")
        return ids
    folder = _below_root(remove, "remove", root)
    if not pc.any(pc.starts_with(live.images.path_column, pattern=folder)).as_py():
        raise UserError(f"remove={remove}: it contains no photo of the index; expected a folder of {root}")
    return live.ids_below(folder)


def _less_unreadable(gone: NDArray[np.int64], images: Manifest, added: Manifest, described: str) -> NDArray[np.int64]:
    """Keep photos whose replacement could not be read."""
    rejected = descriptor_shards.read_rejected(described)
    if not len(rejected):
        return gone
    unread = pc.is_in(images.path_column.take(pa.array(gone)), value_set=rejected.column("path"))
    say(f"index: {len(rejected):,} of {len(added):,} added photos can't be read ({described}/rejected.parquet)")
    return gone[~unread.to_numpy()]


def _below_root(folder: str, key: str, root: str) -> str:
    """`folder` relative to the root, ending in a slash; empty for the root itself."""
    below = storage.absolute(folder).rstrip("/") + "/"
    above = root.rstrip("/") + "/"
    if not below.startswith(above):
        raise UserError(
            f"{key}={folder}: it is not in {root}, where the index's photos are; expected a folder there, or a list "
            f"({', '.join(LIST_SUFFIXES)}) of paths relative to it"
        )
    return below[len(above) :]


def _listed(url: str, key: str, root: str) -> list[str]:
    """Paths that a list names, each once."""
    if url.lower().endswith(".txt"):
        try:
            lines = storage.read_bytes(url).decode("utf-8-sig").splitlines()
        except FileNotFoundError as error:
            raise UserError(f"{key}={url}: no such file; expected a list of paths relative to {root}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{key}={url}: can't be read: {storage.reason(error)}") from error
        paths = [line.strip() for line in lines if line.strip()]
    else:
        problems = Problems()
        rows = TableFile.open(url, key).read(["path"], problems)
        problems.raise_if_any()
        paths = [path for path in rows.texts("path").to_pylist() if path]
    paths = [posixpath.normpath(path) for path in paths]
    outside = next((path for path in paths if path.startswith(("/", "../"))), None)
    if outside is not None:
        raise UserError(f"{key}={url}: {outside} is not a path inside {root}; expected paths relative to it")
    if not paths:
        raise UserError(f"{key}={url}: it lists no path; expected paths relative to {root}")
    wrong = next((path for path in paths if key == "add" and not path.lower().endswith(IMAGE_SUFFIXES)), None)
    if wrong is not None:
        raise UserError(f"{key}={url}: {wrong} is not a photo; expected {', '.join(IMAGE_SUFFIXES)} files")
    return list(dict.fromkeys(paths))


if __name__ == "__main__":
    sys.exit(run_job("update_index"))
