"""`pairvpr update_index index.path=INDEX add=DIR remove=LIST.txt`: photos come and go.

Each change is a new generation of the index.
"""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray
from pyarrow import compute

from pairvpr.cli import run_job
from pairvpr.config.compose import load
from pairvpr.config.schema import UpdateIndexConfig
from pairvpr.data import storage
from pairvpr.data.claim import check_writable
from pairvpr.data.manifest import IMAGE_SUFFIXES, Manifest, folder_manifest
from pairvpr.data.problems import Problems
from pairvpr.data.tables import TableFile
from pairvpr.distributed.describe import Description, describe
from pairvpr.distributed.index import RayRunner
from pairvpr.distributed.progress import say
from pairvpr.distributed.runtime import ModelSource, ray_session
from pairvpr.errors import UserError
from pairvpr.index import choose
from pairvpr.index.make import is_wanted, next_generation
from pairvpr.index.manifest import IndexManifest, check_model, commit, read_images
from pairvpr.index.reader import removed_ids
from pairvpr.index.update import compacted, with_added, without
from pairvpr.models.weights import announce, find_weights, load_weights
from ray_jobs.run import index_settings, located, open_manifest
from ray_jobs.steps import about_generation, memory_budget_bytes

pc: Any = compute  # its functions are made at run time, so their types are not known

LIST_SUFFIXES = (".txt", ".csv", ".parquet")


def main(arguments: Sequence[str]) -> None:
    """One change, one generation."""
    update_index(load(UpdateIndexConfig, arguments))


def update_index(config: UpdateIndexConfig) -> IndexManifest:
    """Add, remove, compact, or change the kind; returns the new generation.

    Raises `UserError` before anything is written for what can't be done, and at the end where another writer was
    faster: then nothing of the index has changed.
    """
    directory = storage.absolute(config.index.path)
    manifest = open_manifest(directory, config.index.path)
    _check_single_writer(directory, config.single_writer)
    check_writable(directory, "index.path")
    images = read_images(directory, manifest)
    removed = removed_ids(directory, manifest)
    added = _added(config, images)
    gone = _gone(config, images, removed, added)
    weights = find_weights(config.model)
    database = images if added is None else added
    settings = index_settings(database, 1, config.model, weights, config.describe)
    check_model(directory, manifest, name=config.model.name, weights_sha256=weights.sha256, model=settings["model"])
    announce(config.model, weights)
    prefix = _prefix(manifest, settings, gone, added, config)
    with ray_session(config.cluster):
        draft = replace(manifest, generation=manifest.generation + 1)
        threads, runner = config.index.num_build_threads, RayRunner()
        if added is not None:
            num_shards = config.index.num_shards or choose.default_num_shards(len(added))
            source = ModelSource(config.model, ray.put(load_weights(config.model, weights)))
            below = storage.join(directory, prefix.rstrip("/"))
            what = Description(added, below, num_shards, source, config.describe, draft.num_images)
            describe(what, "added photos", needs_a_readable_photo=True)
            draft = with_added(directory, draft, prefix, len(added), num_shards, threads, runner)
            gone = _less_unreadable(gone, images, added, below)
        if len(gone):
            draft = without(directory, draft, prefix, gone)
        if config.compact:
            draft = compacted(directory, draft, prefix, config.index.compact_share, threads, runner)
        options = config.index.as_build_config()
        if config.index.kind is not None and not is_wanted(draft, options):
            draft = next_generation(directory, draft, options, memory_budget_bytes(options), runner)
        if replace(draft, generation=manifest.generation) == manifest:
            say("index: nothing to change")
            return manifest
        commit(directory, draft)
    num_added = draft.num_images - manifest.num_images - (draft.num_rejected - manifest.num_rejected)
    num_gone = draft.num_removed - manifest.num_removed
    say(f"{about_generation(draft)}: {num_added:,} added, {num_gone:,} removed or replaced")
    return draft


def _check_single_writer(directory: str, single_writer: bool) -> None:
    if not single_writer and not storage.has_atomic_creation(directory):
        raise UserError(
            f"index.path={directory}: this store may let two writers both create the same generation, and one change "
            "would be lost; expected single_writer=true, your word that nobody else changes this index now"
        )


def _prefix(
    manifest: IndexManifest,
    settings: dict[str, object],
    gone: NDArray[np.int64],
    added: Manifest | None,
    config: UpdateIndexConfig,
) -> str:
    """Where this change keeps its files. Two different changes never share a folder, the same one finds it again."""
    places = b"" if added is None else added.utm_m.tobytes() + added.heading_deg.tobytes()
    cut = [config.index.num_shards, config.index.num_build_threads, config.index.compact_share]
    about = [
        manifest.generation,
        settings,
        cut,
        *(hashlib.sha256(data).hexdigest() for data in (gone.tobytes(), places)),
    ]
    token = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
    return f"updates/{manifest.generation + 1:06d}-{token}/"


def _added(config: UpdateIndexConfig, images: Manifest) -> Manifest | None:
    """The photos to add, by their paths below the root of the index's photos."""
    if config.add is None:
        return None
    if config.add.lower().endswith(LIST_SUFFIXES):
        paths = _listed(config.add, "add", images.root)
    else:
        folder = _below_root(config.add, "add", images.root)
        paths = [f"{folder}{path}" for path in folder_manifest(config.add, "add").paths]
    return located(Manifest.of(images.root, sorted(set(paths))), config, "add")


def _gone(
    config: UpdateIndexConfig, images: Manifest, removed: NDArray[np.int64], added: Manifest | None
) -> NDArray[np.int64]:
    """Ids to remove, ascending: those of `remove`, and those whose paths are added again."""
    live = np.setdiff1d(np.arange(len(images)), removed, assume_unique=True)
    there = images.only(live)
    gone = [np.empty(0, np.int64)]
    if config.remove is not None:
        gone.append(live[_found(config.remove, there)])
    if added is not None:
        again = there.ids_of(added.path_column)
        again = live[again[again >= 0]]
        both = np.intersect1d(gone[-1], again)
        if len(both):
            raise UserError(f"add and remove both name {images.path(int(both[0]))}; expected each photo in one of them")
        gone.append(again)
    return np.unique(np.concatenate(gone))


def _found(remove: str, there: Manifest) -> NDArray[np.int64]:
    """Positions in `there` of what `remove` names."""
    if remove.lower().endswith(LIST_SUFFIXES):
        paths = _listed(remove, "remove", there.root)
        rows = there.ids_of(pa.chunked_array([pa.array(paths, pa.string())]))
        if (rows < 0).any():
            unknown = [path for path, row in zip(paths, rows.tolist(), strict=True) if row < 0]
            raise UserError(
                f"remove={remove}: {unknown[0]} is not in the index (nor are {len(unknown) - 1:,} more); expected "
                f"paths relative to {there.root}"
            )
        return rows
    folder = _below_root(remove, "remove", there.root)
    rows = np.array([row for row, path in enumerate(there.paths) if path.startswith(folder)], np.int64)
    if not len(rows):
        raise UserError(f"remove={remove}: no photo of the index is below it; expected a folder of {there.root}")
    return rows


def _less_unreadable(gone: NDArray[np.int64], images: Manifest, added: Manifest, described: str) -> NDArray[np.int64]:
    """A photo that was to be replaced stays where what replaces it could not be read."""
    rejected = pq.read_table(io.BytesIO(storage.read_bytes(storage.join(described, "rejected.parquet"))))
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
            f"{key}={folder}: not below {root}, where the index's photos are; expected a folder there, or a list "
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
        raise UserError(f"{key}={url}: {outside} is not relative to {root}; expected paths below it, without the root")
    if not paths:
        raise UserError(f"{key}={url}: no path in it; expected paths relative to {root}")
    wrong = next((path for path in paths if key == "add" and not path.lower().endswith(IMAGE_SUFFIXES)), None)
    if wrong is not None:
        raise UserError(f"{key}={url}: {wrong} is no photo; expected {', '.join(IMAGE_SUFFIXES)} files")
    return list(dict.fromkeys(paths))


if __name__ == "__main__":
    sys.exit(run_job("update_index"))
