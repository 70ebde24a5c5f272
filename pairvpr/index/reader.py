"""An index opened for search: the checked shards of one generation, in memory or mapped. n rows of G values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from pairvpr.config.schema import IndexKind
from pairvpr.data import storage
from pairvpr.data.local_cache import LocalCache
from pairvpr.errors import UserError
from pairvpr.index import build, choose, descriptor_shards
from pairvpr.index.filters import Filters, Places
from pairvpr.index.generations import IndexManifest, ShardEntry, StoredFile
from pairvpr.index.merge import Found, merge_top_k
from pairvpr.index.search import Effort, Shard, rescore, search, search_filtered
from pairvpr.index.threads import faiss_threads

LEAST_RESCORED_PER_RESULT = 2


def check_faiss_has_gpus() -> None:
    """Raise `UserError` where faiss was built for CPUs alone."""
    if not hasattr(faiss, "StandardGpuResources"):
        raise UserError(
            "index.num_gpus_per_actor: this faiss has no GPU part (faiss-cpu); expected faiss-gpu in its place, or 0"
        )


class OpenIndex:
    """One generation of an index. `cache` keeps local copies of remote files.

    With `memory_map` a shard's faiss file is mapped; otherwise it is read into memory. With `has_gpu` the short lists
    of a flat index are computed on this process's GPU.
    """

    def __init__(
        self,
        directory: str,
        manifest: IndexManifest,
        cache: LocalCache,
        *,
        memory_map: bool = False,
        has_gpu: bool = False,
    ) -> None:
        self.directory = directory
        self.manifest = manifest
        self.spec = build.spec_of(manifest.kind, manifest.factory)
        self._cache = cache
        self._gpu: Any = None
        if has_gpu and self.spec.kind is IndexKind.flat:
            check_faiss_has_gpus()
            self._gpu = faiss.StandardGpuResources()  # pyright: ignore[reportAttributeAccessIssue]
        self._flags = faiss.IO_FLAG_MMAP_IFC if memory_map else 0
        self._trained: Any = None
        if manifest.trained is not None:
            with self._open(manifest.trained) as path:
                self._trained = build.read_faiss(path, self._url(manifest.trained))
        self._removed = removed_ids(directory, manifest)

    @property
    def effort(self) -> Effort:
        """The default search effort."""
        return Effort(**self.manifest.effort)

    def visits(self, queries: NDArray[np.float32], effort: Effort, num_threads: int) -> Found | None:
        """The lists (Q, probes) that a query visits in every shard, and their centroids' distances, nearest first."""
        if not self.spec.num_lists:
            return None
        num_probes = min(effort.num_probes, self.spec.num_lists)
        with faiss_threads(num_threads):
            return self._trained.quantizer.search(np.ascontiguousarray(queries, np.float32), num_probes)

    def shard(self, number: int) -> Shard:
        """Open a shard. Raises `UserError`, naming the file, if its bytes have changed or contradict the manifest."""
        entry = self.manifest.shards[number]
        index, is_removed = self._index(entry, self._flags), self.is_removed(number) if entry.num_removed else None
        on_gpu = None
        if self._gpu is not None:
            on_gpu = faiss.index_cpu_to_gpu(self._gpu, 0, index)  # pyright: ignore[reportAttributeAccessIssue]
        return Shard(index, self.ids(number), is_removed, on_gpu)

    def joined(self, numbers: range) -> Shard:
        """Open a group from `groups_of_shards`; several shards are copied into one index in memory, even with
        `memory_map`.

        Raises `UserError` as `shard` does.
        """
        if len(numbers) == 1:
            return self.shard(numbers[0])
        entries = [self.manifest.shards[number] for number in numbers]
        index = self._index(entries[0], flags=0)
        for entry in entries[1:]:
            index.merge_from(self._index(entry, flags=0), index.ntotal)
        is_removed = None
        if any(entry.num_removed for entry in entries):
            is_removed = np.concatenate([self.is_removed(number) for number in numbers])
        return Shard(index, np.concatenate([self.ids(number) for number in numbers]), is_removed)

    def is_removed(self, number: int) -> NDArray[np.bool_]:
        """(n,) whether rows of a shard belong to removed photos."""
        entry = self.manifest.shards[number]
        first, stop = np.searchsorted(self._removed, [entry.first_id, entry.first_id + entry.count])
        return np.isin(self.ids(number), self._removed[first:stop], assume_unique=True)

    def ids(self, number: int) -> NDArray[np.int64]:
        """Image ids (n,) of a shard's rows, ascending."""
        entry = self.manifest.shards[number]
        with self._open(entry.files["ids.npy"]) as path:
            ids = descriptor_shards.load_array(path, np.int64, 1, self._url(entry.files["ids.npy"]))
        self._check(entry.files["ids.npy"], "rows", len(ids), entry.num_rows)
        return ids

    def descriptors(self, number: int) -> NDArray[np.float32]:
        """The rows (n, G) of a shard, mapped."""
        entry = self.manifest.shards[number]
        file = entry.files["descriptors.npy"]
        with self._open(file) as path:
            rows = descriptor_shards.load_array(path, np.float32, 2, self._url(file), mmap_mode="r")
        self._check(file, "rows", len(rows), entry.num_rows)
        self._check(file, "values per row", rows.shape[1], self.manifest.descriptor_dim)
        return rows

    def _index(self, entry: ShardEntry, flags: int) -> Any:
        name = self.spec.index_file(self.manifest.trained)
        if name not in entry.files:
            raise UserError(f"{self.directory}: the manifest lists no {name} for {entry.path}; build the index again")
        file = entry.files[name]
        with self._open(file) as path:
            index = build.read_faiss(path, self._url(file), flags)
        self._check(file, "values per row", index.d, self.manifest.descriptor_dim)
        self._check(file, "rows", index.ntotal, entry.num_rows)
        if self._trained is not None and self.spec.num_lists:
            self._share_centres(index)
        return index

    def _share_centres(self, index: Any) -> None:
        index.own_fields = False
        index.quantizer = self._trained.quantizer
        index.referenced_objects = [self._trained]

    def _url(self, file: StoredFile) -> str:
        return storage.join(self.directory, file.path)

    @contextmanager
    def _open(self, file: StoredFile) -> Iterator[str]:
        """A path to the checked file, valid inside the block."""
        try:
            with self._cache.open(self._url(file), file.sha256, file.bytes) as path:
                yield path
        except FileNotFoundError as error:
            raise UserError(f"{self._url(file)} is missing; build the index again") from error

    def _check(self, file: StoredFile, what: str, found: int, expected: int) -> None:
        if found != expected:
            raise UserError(
                f"{storage.join(self.directory, file.path)}: {found:,} {what}, but the manifest has {expected:,}; "
                "build the index again"
            )


class WarmIndex(OpenIndex):
    """An open index that keeps its shards in memory between searches, with the same results as `OpenIndex`.

    It keeps as many groups of shards, in order, as fit into `budget_bytes` according to the plan
    (`choose.bytes_per_row`). The others are opened and released for every search. Shards kept by `before`, an earlier
    generation of the same index, are reused. `part` and `num_parts` say which groups it has, if others have the rest.
    Threads may share it.
    """

    def __init__(
        self,
        directory: str,
        manifest: IndexManifest,
        cache: LocalCache,
        *,
        budget_bytes: float,
        memory_map: bool = False,
        has_gpu: bool = False,
        before: WarmIndex | None = None,
        part: int = 0,
        num_parts: int = 1,
    ) -> None:
        super().__init__(directory, manifest, cache, memory_map=memory_map, has_gpu=has_gpu)
        self._shards: dict[range, Shard] = {}
        self._ids: dict[int, NDArray[np.int64]] = {}
        self._descriptors: dict[int, NDArray[np.float32]] = {}
        row_bytes = choose.bytes_per_row(self.spec.kind, manifest.descriptor_dim)
        left_bytes = budget_bytes
        self.groups = groups_of_part(manifest, part, num_parts)
        for group in self.groups:
            left_bytes -= row_bytes * sum(manifest.shards[number].num_rows for number in group)
            if left_bytes < 0:
                break
            self._keep(group, before)

    @property
    def num_shards_kept(self) -> int:
        """The shards that stay in memory."""
        return len(self._ids)

    def joined(self, numbers: range) -> Shard:
        """See `OpenIndex.joined`."""
        return self._shards[numbers] if numbers in self._shards else super().joined(numbers)

    def ids(self, number: int) -> NDArray[np.int64]:
        """See `OpenIndex.ids`."""
        return self._ids[number] if number in self._ids else super().ids(number)

    def descriptors(self, number: int) -> NDArray[np.float32]:
        """See `OpenIndex.descriptors`; the file stays mapped."""
        if number not in self._descriptors:
            self._descriptors[number] = super().descriptors(number)
        return self._descriptors[number]

    def _keep(self, group: range, before: WarmIndex | None) -> None:
        shard = None if before is None else before._kept_of(self._files(group))
        if shard is None:
            shard = super().joined(group)
            if len(group) > 1:
                shard = replace(shard, index=self._without_spare_room(shard.index))
        stop = 0
        for number in group:
            first, stop = stop, stop + self.manifest.shards[number].num_rows
            self._ids[number] = shard.ids[first:stop]
        is_removed = None
        if any(self.manifest.shards[number].num_removed for number in group):
            is_removed = np.concatenate([self.is_removed(number) for number in group])
        self._shards[group] = replace(shard, is_removed=is_removed)

    def _without_spare_room(self, joined: Any) -> Any:
        """A copy, to release memory: lists that grew while shards were joined take up to twice their content."""
        no_centres = faiss.IndexFlatL2(joined.d)  # copied instead of the centroids, which all shards share
        joined.quantizer = no_centres
        index: Any = faiss.clone_index(joined)
        self._share_centres(index)
        return index

    def _files(self, group: range) -> list[str]:
        """Digests of a group's files."""
        index_file, trained = self.spec.index_file(self.manifest.trained), self.manifest.trained
        entries = [self.manifest.shards[number] for number in group]
        files = [entry.files[name] for entry in entries for name in (index_file, "ids.npy")]
        return [file.sha256 for file in ([trained] if trained else []) + files]

    def _kept_of(self, files: list[str]) -> Shard | None:
        """The kept group with these files."""
        return next((shard for group, shard in self._shards.items() if self._files(group) == files), None)


def search_index(
    opened: OpenIndex,
    queries: NDArray[np.float32],
    k: int,
    *,
    num_threads: int,
    effort: Effort | None = None,
    filters: tuple[Filters, Places] | None = None,
) -> Found:
    """The k nearest photos for each query (Q, G), shard by shard on this machine: (Q, k), or as many as there are.

    `filters` says which photos each query may find; if they are fewer than k, the rest of the ids is -1.
    """
    effort, groups = effort or opened.effort, groups_of_shards(opened.manifest)
    found = search_groups(opened, groups, queries, k, num_threads=num_threads, effort=effort, filters=filters)
    assert found is not None, "an index has a shard"
    if not choose.KINDS[opened.spec.kind].is_rescored:
        return found
    distances = rescored_in_groups(opened, groups, queries, found[1], num_threads=num_threads)
    return merge_top_k([(distances, found[1])], k)


def search_groups(
    opened: OpenIndex,
    groups: Sequence[range],
    queries: NDArray[np.float32],
    k: int,
    *,
    num_threads: int,
    effort: Effort,
    filters: tuple[Filters, Places] | None = None,
) -> Found | None:
    """The nearest of some groups of shards: as many as a search for k keeps before it computes exact distances."""
    length = short_list_length(opened.manifest, effort, k)
    options: dict[str, Any] = {"num_threads": num_threads, "effort": effort, "at_least": k}
    options["visits"] = opened.visits(queries, effort, num_threads)
    found: Found | None = None
    for group in groups:
        shard = opened.joined(group)
        part = (
            search(shard, queries, length, **options)
            if filters is None
            else search_filtered(shard, queries, length, *filters, **options)
        )
        found = merge_top_k([part] if found is None else [found, part], length)
    return found


def rescored_in_groups(
    opened: OpenIndex,
    groups: Sequence[range],
    queries: NDArray[np.float32],
    ids: NDArray[np.int64],
    *,
    num_threads: int,
) -> NDArray[np.float32]:
    """Exact squared distances of short lists (Q, S); infinite for ids that are in none of these groups."""
    distances = np.full(ids.shape, np.inf, np.float32)
    for number in (number for group in groups for number in group):
        its = rescore(opened.descriptors(number), opened.ids(number), queries, ids, num_threads=num_threads)
        np.minimum(distances, its, out=distances)
    return distances


def groups_of_part(manifest: IndexManifest, part: int, num_parts: int) -> list[range]:
    """The groups of shards in one of several parts, which have about the same number of rows; maybe none."""
    groups = groups_of_shards(manifest)
    sizes = [1 + sum(manifest.shards[number].num_rows for number in group) for group in groups]
    parts = cut_into_groups(sizes, min(num_parts, len(groups)))
    return groups[parts[part].start : parts[part].stop] if part < len(parts) else []


def groups_of_shards(manifest: IndexManifest) -> list[range]:
    """Groups of consecutive shards that are searched together (`choose.num_groups`), with similar numbers of rows.

    Independent of settings and actors, because a query visits more lists if those of a group hold too few rows.
    """
    spec = build.spec_of(manifest.kind, manifest.factory)
    counts = [entry.num_rows for entry in manifest.shards]
    about = (spec.kind, len(counts), sum(counts), manifest.descriptor_dim, spec.num_lists)
    return cut_into_groups([1 + count for count in counts], choose.num_groups(*about))


def cut_into_groups(sizes: Sequence[int], num_groups: int) -> list[range]:
    """Split a sequence of these sizes (above 0) into at most `num_groups` runs of about the same total size.

    A group exceeds its share by at most half of its first and half of its last member.
    """
    if num_groups == len(sizes):
        return [range(number, number + 1) for number in range(len(sizes))]
    stops = np.cumsum(sizes)
    group_of = ((stops - np.asarray(sizes) / 2) / stops[-1] * num_groups).astype(np.int64)
    firsts = [0, *(np.flatnonzero(np.diff(group_of)) + 1).tolist(), len(sizes)]
    return [range(first, stop) for first, stop in pairwise(firsts)]


def short_list_length(manifest: IndexManifest, effort: Effort, k: int) -> int:
    """The number of nearest codes to keep over all shards; k if codes give the final answer."""
    is_rescored = choose.KINDS[IndexKind(manifest.kind)].is_rescored
    return max(effort.num_rescored, LEAST_RESCORED_PER_RESULT * k) if is_rescored else k


def live_ids(directory: str, manifest: IndexManifest) -> NDArray[np.int64]:
    """Ids of the photos that a search can find, ascending."""
    parts = [
        descriptor_shards.read_checked_array(directory, entry.files["ids.npy"], np.int64, 1)
        for entry in manifest.shards
    ]
    return np.setdiff1d(np.concatenate(parts), removed_ids(directory, manifest), assume_unique=True)


def removed_ids(directory: str, manifest: IndexManifest) -> NDArray[np.int64]:
    """Ids of the photos that were removed, ascending."""
    parts = [descriptor_shards.read_checked_array(directory, file, np.int64, 1) for file in manifest.removed]
    return np.sort(np.concatenate([np.empty(0, np.int64), *parts]))
