"""What `benchmarks.index_at_size` does in processes of their own: build an index, search it, change it.

Neither torch nor Ray is imported here, except for the job's way. Q queries, G values a row, k results.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import faiss as faiss_module
import numpy as np
from numpy.typing import NDArray

from benchmarks.fresh_process import FreshProcesses, Ran
from benchmarks.index_rows import NUM_VALUES, ROWS_AT_ONCE
from pairvpr.config.schema import BuildConfig, ClusterConfig, SearchConfig
from pairvpr.data import storage
from pairvpr.data.local_cache import LocalCache
from pairvpr.data.manifest import Manifest
from pairvpr.index import build, choose, descriptor_shards, make, measure
from pairvpr.index.generations import IndexManifest, commit, generation_url
from pairvpr.index.make import LocalRunner, build_shards, first_generation, next_generation
from pairvpr.index.reader import OpenIndex, groups_of_shards, search_index
from pairvpr.index.search import Effort, Shard
from pairvpr.index.update import with_added, without

faiss: Any = faiss_module

MODEL = {"name": "drawn", "weights_sha256": "0" * 64}
NUM_THREADS = 2
NUM_TO_WARM_UP, NUM_ALONE = 32, 10
UPDATE_STEPS: tuple[str, ...] = ("writing descriptors", "adding", "removing", "committing")


@dataclass(frozen=True)
class Asked:
    """An answer (Q, k), its seconds, and what came before: opening, checksums, reading into memory.

    `alone_s` are the seconds of one query that is asked alone, the mean of some.
    """

    ids: NDArray[np.int64]
    seconds: float
    open_s: float = 0.0
    alone_s: float = 0.0


class HeldIndex(OpenIndex):
    """An index whose shards stay in memory once they were asked for (descriptors stay mapped)."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._held = dict[tuple[str, Hashable], Any]()

    def joined(self, numbers: Sequence[int]) -> Shard:
        """As `OpenIndex` does, once."""
        return self._once("joined", numbers)

    def ids(self, number: int) -> NDArray[np.int64]:
        """As `OpenIndex` does, once."""
        return self._once("ids", number)

    def descriptors(self, number: int) -> NDArray[np.float32]:
        """As `OpenIndex` does, once."""
        return self._once("descriptors", number)

    def _once(self, what: str, which: Hashable) -> Any:
        if (what, which) not in self._held:
            self._held[what, which] = getattr(super(), what)(which)
        return self._held[what, which]

    def hold(self) -> None:
        """All that a search asks for."""
        for group in groups_of_shards(self.manifest):
            self.joined(group)
        if choose.KINDS[self.spec.kind].is_rescored:
            for number in range(len(self.manifest.shards)):
                self.ids(number)
                self.descriptors(number)


def describe(directory: str, file: Path, num_rows: int, num_shards: int, first_id: int = 0) -> Manifest:
    """A finished description of photos whose descriptors are the first rows of a file; returns these photos."""
    images = Manifest.of("/photos", [f"{i:09d}.jpg" for i in range(first_id, first_id + num_rows)])
    images.write(storage.join(directory, "images.parquet"), first_id)
    rows, described = np.load(file, mmap_mode="r"), []
    for each in descriptor_shards.shard_ranges(num_rows, num_shards):
        ids, piece = np.arange(each.first_id, each.stop_id), rows[each.first_id : each.stop_id]
        where = {"first_id": first_id + each.first_id, "count": each.count}
        described.append(
            descriptor_shards.write_shard_description(
                directory, each.shard, first_id + ids, piece, **where, rejected={}, seconds=0.0
            )
        )
    descriptor_shards.finish_description(directory, images, described, first_id)
    return images


def draft(directory: str) -> IndexManifest:
    """The first generation of a described index, less its kind."""
    images = Manifest.read(storage.join(directory, "images.parquet"), "/photos")
    about = descriptor_shards.read_description(directory)
    assert about is not None, f"{directory} is not described"
    return first_generation(directory, images, about.num_shards, MODEL, NUM_VALUES)


def build_index(
    directory: str, start: IndexManifest | None, config: BuildConfig, budget_bytes: float
) -> tuple[IndexManifest, list[Ran[None]]]:
    """A generation of an index, each piece of work in a process of its own as on a cluster; and what they took."""
    runner = FreshProcesses()
    manifest = next_generation(directory, start or draft(directory), config, budget_bytes, runner)
    commit(directory, manifest)
    return manifest, runner.ran


def build_alike(directory: str, other_directory: str, other: IndexManifest) -> IndexManifest:
    """A described index of the kind, the lists and the effort of another one; nothing is learnt."""
    start, trained = draft(directory), other.trained
    if trained is not None:
        shutil.copyfile(Path(other_directory) / trained.path, Path(directory) / trained.path)
    spec = build.spec_of(other.kind, other.factory)
    shards = build_shards(directory, start.shards, spec, trained, NUM_THREADS, LocalRunner())
    return replace(start, kind=other.kind, factory=other.factory, trained=trained, shards=shards, effort=other.effort)


def search_bare(rows_file: Path, queries: NDArray[np.float32], k: int) -> Asked:
    """One faiss index over all rows, which are read piece by piece into their place."""
    start_s = time.perf_counter()
    faiss.omp_set_num_threads(NUM_THREADS)
    mapped = np.load(rows_file, mmap_mode="r")
    index = faiss.IndexFlatL2(mapped.shape[1])
    index.codes.resize(mapped.nbytes)
    index.ntotal = len(mapped)
    rows = faiss.rev_swig_ptr(index.get_xb(), mapped.size).reshape(mapped.shape)
    for first in range(0, len(rows), ROWS_AT_ONCE):
        rows[first : first + ROWS_AT_ONCE] = mapped[first : first + ROWS_AT_ONCE]
    del mapped
    return _timed(lambda some: index.search(some, k)[1], queries, start_s)


def search_held(directory: str, manifest: IndexManifest, queries: NDArray[np.float32], k: int) -> Asked:
    """All shards in memory before the clock starts."""
    start_s = time.perf_counter()
    opened = HeldIndex(directory, manifest, _no_cache())
    opened.hold()
    return _timed(lambda some: search_index(opened, some, k, num_threads=NUM_THREADS)[1], queries, start_s)


def _timed(
    search: Callable[[NDArray[np.float32]], NDArray[np.int64]], queries: NDArray[np.float32], start_s: float
) -> Asked:
    """All queries at once, and some of them one by one."""
    search(queries[:NUM_TO_WARM_UP])
    started_s = time.perf_counter()
    ids = search(queries)
    done_s = time.perf_counter()
    for number in range(NUM_ALONE):
        search(queries[number : number + 1])
    alone_s = (time.perf_counter() - done_s) / NUM_ALONE
    return Asked(ids, done_s - started_s, started_s - start_s, alone_s)


def search_one_at_a_time(directory: str, manifest: IndexManifest, queries: NDArray[np.float32], k: int) -> Asked:
    """One shard in memory at a time; reading and checking them is part of the seconds."""
    start_s = time.perf_counter()
    _, ids = search_index(OpenIndex(directory, manifest, _no_cache()), queries, k, num_threads=NUM_THREADS)
    return Asked(ids, time.perf_counter() - start_s)


def search_with_ray(directory: str, manifest: IndexManifest, queries: NDArray[np.float32], k: int) -> Asked:
    """As the jobs do, with one actor; reading and checking shards is part of the seconds, starting Ray is not."""
    from pairvpr.distributed.retrieve import SearchRequest, search_shards
    from pairvpr.distributed.runtime import ray_session

    os.environ.pop("RAY_ADDRESS", None)
    config = SearchConfig(num_actors=1, num_threads_per_actor=NUM_THREADS)
    start_s = time.perf_counter()
    with ray_session(ClusterConfig(num_cpus=NUM_THREADS)):
        started_s = time.perf_counter()
        found, _ = search_shards(SearchRequest(directory, manifest, queries, k), config)
        return Asked(found[1], time.perf_counter() - started_s, started_s - start_s)


def curve(
    directory: str, manifest: IndexManifest, queries: NDArray[np.float32], k: int, truth: NDArray[np.int64]
) -> list[tuple[Effort, float, float]]:
    """Recall of the exact nearest and seconds, from a quarter of the effort on to eight times of it."""
    opened = HeldIndex(directory, manifest, _no_cache())
    opened.hold()
    search_index(opened, queries[:NUM_TO_WARM_UP], k, num_threads=NUM_THREADS)
    chosen, num_lists = opened.effort.num_probes, opened.spec.num_lists
    probes = {min(num_lists, max(1, chosen * factor // 4)) for factor in (1, 2, 4, 8, 16, 32)}
    is_rescored = choose.KINDS[opened.spec.kind].is_rescored
    steps = []
    for num_probes in sorted(probes):
        for num_rescored in measure.RESCORED_STEPS if is_rescored else (0,):
            effort, start_s = Effort(num_probes, num_rescored), time.perf_counter()
            _, ids = search_index(opened, queries, k, num_threads=NUM_THREADS, effort=effort)
            steps.append((effort, measure.recall(ids, truth)[0], time.perf_counter() - start_s))
    return steps


@dataclass(frozen=True)
class Updated:
    """The generation that a change made; its seconds by step, and the bytes of all files it wrote."""

    manifest: IndexManifest
    seconds: dict[str, float]
    num_bytes: int


def update(
    directory: str, manifest: IndexManifest, generation: int, added_file: Path, num_added: int, gone: NDArray[np.int64]
) -> Updated:
    """Photos added and removed, as the job update_index does with descriptors that are there."""
    prefix, times_s = f"updates/{generation:06d}/", [time.perf_counter()]
    added = describe(storage.join(directory, prefix.rstrip("/")), added_file, num_added, 1, manifest.num_images)
    times_s.append(time.perf_counter())
    changed = replace(manifest, generation=generation)
    changed = with_added(directory, changed, prefix, added, 1, NUM_THREADS, LocalRunner())
    times_s.append(time.perf_counter())
    changed = without(directory, changed, prefix, gone)
    times_s.append(time.perf_counter())
    commit(directory, changed)
    times_s.append(time.perf_counter())
    written = [file for file in (Path(directory) / prefix).rglob("*") if file.is_file()]
    written += [Path(generation_url(directory, generation)), Path(directory) / "manifest.json"]
    seconds = dict(zip(UPDATE_STEPS, np.diff(times_s).tolist(), strict=True))
    return Updated(changed, seconds, sum(file.stat().st_size for file in written))


def one_of_many_shards(
    directory: str, spec: build.IndexSpec, learnt_from: str, other: IndexManifest
) -> tuple[IndexManifest, list[Ran[None]]]:
    """The described shard as one of a much larger index, whose lists are learnt from another index's rows."""
    runner, start = FreshProcesses(), draft(directory)
    (trained,) = runner.run("learning", make._train, [(learnt_from, other, spec, NUM_THREADS)])
    shutil.copyfile(Path(learnt_from) / trained.path, Path(directory) / trained.path)
    shards = build_shards(directory, start.shards, spec, trained, NUM_THREADS, runner)
    effort = {"num_probes": max(1, spec.num_lists // 64), "num_rescored": 400}
    manifest = replace(start, kind=spec.kind.value, factory=spec.factory, trained=trained, shards=shards, effort=effort)
    return manifest, runner.ran


def shards_bytes(manifest: IndexManifest) -> list[int]:
    """What a search needs in memory of each shard: faiss file and ids."""
    name = build.spec_of(manifest.kind, manifest.factory).index_file(manifest.trained)
    return [entry.files[name].bytes + entry.files["ids.npy"].bytes for entry in manifest.shards]


def _no_cache() -> LocalCache:
    """For files that are all local."""
    return LocalCache(Path("/nonexistent"), 0)
