"""Indices of given descriptors, made on this machine without a network and without Ray."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pairvpr.config.schema import BuildConfig, IndexKind
from pairvpr.data import storage
from pairvpr.data.local_cache import LocalCache
from pairvpr.data.manifest import Manifest
from pairvpr.index import descriptor_shards
from pairvpr.index.generations import IndexManifest, commit
from pairvpr.index.make import LocalRunner, first_generation, next_generation
from pairvpr.index.reader import OpenIndex

MODEL = {"name": "small", "weights_sha256": "ab" * 32}
PLENTY_BYTES = 1e15
FLAT = BuildConfig(kind=IndexKind.flat)


def describe_rows(
    directory: str,
    images: Manifest,
    descriptors: NDArray[np.float32],
    cuts: Sequence[int],
    rejected: Mapping[int, str] | None = None,
    first_id: int = 0,
) -> int:
    """A finished description of photos whose descriptors (n, G) are given, cut at `cuts`; returns its shards.

    Photos of `rejected` (positions) have no row.
    """
    images.write(storage.join(directory, "images.parquet"), first_id)
    bounds = [0, *cuts, len(images)]
    described = []
    for shard, (first, stop) in enumerate(itertools.pairwise(bounds)):
        rows = np.array([row for row in range(first, stop) if row not in (rejected or {})], np.int64)
        described.append(
            descriptor_shards.write_shard_description(
                directory,
                shard,
                rows + first_id,
                np.ascontiguousarray(descriptors[rows], np.float32),
                first_id=first + first_id,
                count=stop - first,
                rejected={first_id + row: text for row, text in (rejected or {}).items() if first <= row < stop},
                seconds=0.5,
            )
        )
    descriptor_shards.finish_description(directory, images, described, first_id)
    return len(described)


def write_index(
    directory: str,
    paths: Sequence[str],
    descriptors: NDArray[np.float32],
    cuts: Sequence[int] = (),
    *,
    config: BuildConfig = FLAT,
    rejected: Mapping[int, str] | None = None,
    budget_bytes: float = PLENTY_BYTES,
    images: Manifest | None = None,
) -> IndexManifest:
    """The first generation of an index."""
    images = images or Manifest.of("/photos", list(paths))
    num_shards = describe_rows(directory, images, descriptors, cuts, rejected)
    draft = first_generation(directory, images, num_shards, MODEL, descriptors.shape[1])
    manifest = next_generation(directory, draft, config, budget_bytes, LocalRunner())
    commit(directory, manifest)
    return manifest


def opened(directory: str, manifest: IndexManifest, *, memory_map: bool = False) -> OpenIndex:
    """A local index, or one in memory, opened for search."""
    folder = Path(directory if storage.is_local(directory) else "/nonexistent")
    return OpenIndex(directory, manifest, LocalCache(folder, 1 << 40), memory_map=memory_map)


def build_described(directory: str, kind: str) -> None:
    """Make an index of a finished description of `/photos`, as a process of its own does that may be killed."""
    images = Manifest.read(storage.join(directory, "images.parquet"), "/photos")
    description = descriptor_shards.read_description(directory)
    assert description is not None
    print("ready", flush=True)
    config = BuildConfig(kind=IndexKind(kind), num_lists=16 if kind.startswith("ivf") else None, num_build_threads=1)
    draft = first_generation(directory, images, description.num_shards, MODEL, 32)
    commit(directory, next_generation(directory, draft, config, PLENTY_BYTES, LocalRunner()))
