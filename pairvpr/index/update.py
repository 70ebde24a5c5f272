"""Changes of an index as drafts of its next generation: adding and removing photos, compacting shards.

The files of a change go below its own prefix; no file of an earlier generation is modified.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pairvpr.data import storage
from pairvpr.data.manifest import Manifest
from pairvpr.index import build, descriptor_shards
from pairvpr.index.generations import IndexManifest, ShardEntry, read_generation
from pairvpr.index.make import Runner, build_shards, described_shards, image_table, own_cache
from pairvpr.index.reader import OpenIndex
from pairvpr.index.reduction import reduced_shards

UPDATES = "updates"
"""The folder of an index with a subfolder for each change."""


def with_added(
    directory: str,
    draft: IndexManifest,
    prefix: str,
    added: Manifest,
    num_shards: int,
    num_threads: int,
    runner: Runner,
) -> IndexManifest:
    """Add the photos `added`, described below `prefix`, with ids after all others, indexed like the rest."""
    entries = described_shards(directory, prefix, num_shards, draft.num_images, len(added))
    entries = reduced_shards(directory, entries, draft.reduction, runner)
    spec = build.spec_of(draft.kind, draft.factory)
    entries = build_shards(directory, entries, spec, draft.trained, num_threads, runner)
    return replace(
        draft,
        num_images=draft.num_images + len(added),
        num_rejected=draft.num_rejected + sum(entry.count - entry.num_rows for entry in entries),
        images=[*draft.images, image_table(directory, f"{prefix}images.parquet", added, draft.num_images)],
        shards=[*draft.shards, *entries],
    )


def without(directory: str, draft: IndexManifest, prefix: str, gone: NDArray[np.int64]) -> IndexManifest:
    """The ids `gone` (ascending, not removed before) are removed; their rows stay until their shard is compacted."""
    file = descriptor_shards.write_array(directory, f"{prefix}removed.npy", gone)
    entries = []
    for entry in draft.shards:
        first, stop = np.searchsorted(gone, [entry.first_id, entry.first_id + entry.count])
        if stop > first:
            ids = descriptor_shards.read_checked_array(directory, entry.files["ids.npy"], np.int64, 1)
            num_here = int(np.isin(gone[first:stop], ids, assume_unique=True).sum())
            entry = replace(entry, num_removed=entry.num_removed + num_here)
        entries.append(entry)
    return replace(draft, removed=[*draft.removed, file], num_removed=draft.num_removed + len(gone), shards=entries)


def compacted(
    directory: str, draft: IndexManifest, prefix: str, share: float, num_threads: int, runner: Runner
) -> IndexManifest:
    """Rewrite shards with more than `share` of their rows removed, without these rows; ids do not change."""
    numbers = [number for number, entry in enumerate(draft.shards) if entry.num_removed > share * entry.num_rows]
    if not numbers:
        return draft
    arguments = [(directory, draft, number, f"{prefix}compacted/{number:05d}") for number in numbers]
    entries = runner.run("compact", _compact_shard, arguments)
    spec = build.spec_of(draft.kind, draft.factory)
    entries = build_shards(directory, entries, spec, draft.trained, num_threads, runner)
    by_number = dict(zip(numbers, entries, strict=True))
    return replace(draft, shards=[by_number.get(number, entry) for number, entry in enumerate(draft.shards)])


def _compact_shard(directory: str, manifest: IndexManifest, number: int, path: str) -> ShardEntry:
    entry = manifest.shards[number]
    with own_cache() as cache:
        opened = OpenIndex(directory, manifest, cache)
        ids, is_removed = opened.ids(number), opened.is_removed(number)
        kept = ids[~is_removed], opened.descriptors(number)[~is_removed]
    arrays = zip(descriptor_shards.ARRAYS, kept, strict=True)
    files = {name: descriptor_shards.write_array(directory, f"{path}/{name}", array) for name, array in arrays}
    return replace(entry, path=path, num_rows=len(kept[0]), num_removed=0, files=files)


def remove_leftovers(directory: str, manifest: IndexManifest) -> None:
    """Delete the files below `updates/` of killed updates, and of those that lost to another writer.

    `manifest` is the newest generation: an update for it or an earlier one can never be published any more.
    """
    folders = {path.partition("/")[0] for path in storage.list_files(storage.join(directory, UPDATES))}
    late = {folder for folder in folders if _generation_of(folder) <= manifest.generation}
    for generation in range(manifest.generation, 1, -1):
        if not late:
            return
        late -= _folders_of(read_generation(directory, generation))
    for folder in late:
        storage.remove_tree(storage.join(directory, UPDATES, folder))


def _generation_of(folder: str) -> float:
    """The generation that an update's folder was meant for; infinite for other folders."""
    number = folder.partition("-")[0]
    return int(number) if number.isdecimal() else math.inf


def _folders_of(manifest: IndexManifest | None) -> set[str]:
    """The folders below `updates/` with files of a generation."""
    if manifest is None:
        return set()
    tables = [table.file for table in manifest.images]
    files = [*tables, *manifest.removed, *(file for entry in manifest.shards for file in entry.files.values())]
    if manifest.trained is not None:
        files.append(manifest.trained)
    return {file.path.split("/")[1] for file in files if file.path.startswith(f"{UPDATES}/")}
