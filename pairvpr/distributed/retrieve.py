"""Retrieval: candidates for described queries from the shards of an index. Q queries, k results, short lists of S."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from pairvpr.config.schema import IndexKind, SearchConfig
from pairvpr.data import sealed, storage
from pairvpr.data.local_cache import LocalCache, cache_directory
from pairvpr.distributed.pool import PoolActor, SupervisedPool
from pairvpr.distributed.progress import Progress
from pairvpr.distributed.runtime import ALONE, cpus_of_a_shard, has_gpu, job_cpus
from pairvpr.errors import IncompleteRunError, UserError
from pairvpr.index import choose, descriptor_shards
from pairvpr.index.filters import Filters, Places
from pairvpr.index.generations import IndexManifest
from pairvpr.index.merge import Found, merge_top_k
from pairvpr.index.reader import OpenIndex, check_faiss_has_gpus, groups_of_shards, short_list_length
from pairvpr.index.reduction import read_reduction
from pairvpr.index.search import NO_ID, Effort, rescore, search, search_filtered
from pairvpr.terminal import say

CANDIDATES_SCHEMA = pa.schema(
    [
        ("query_id", pa.int64()),
        ("candidates", pa.list_(pa.int64())),
        ("squared_distances", pa.list_(pa.float32())),
    ]
)
MADE_ANEW = "it is computed again"


@dataclass(frozen=True)
class Candidates:
    """The result for the readable queries: ids (Q,), candidates and squared distances (Q, k).

    If a query's filter allows fewer than k photos, the rest of its row has id -1.
    """

    query_ids: NDArray[np.int64]
    squared_distances: NDArray[np.float32]
    ids: NDArray[np.int64]
    seconds: float
    generation: int

    def of(self, row: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Candidates and distances of one query, best first."""
        num_found = int((self.ids[row] != NO_ID).sum())
        return self.ids[row, :num_found], self.squared_distances[row, :num_found]


@dataclass(frozen=True)
class SearchRequest:
    """The input of all shard actors: `queries` (Q, G), for which they find the k nearest, or short lists from codes."""

    index: str
    manifest: IndexManifest
    queries: NDArray[np.float32]
    k: int
    filters: Filters | None = None
    places: Places | None = None


def retrieve(
    index: str,
    manifest: IndexManifest,
    queries: str,
    k: int,
    config: SearchConfig,
    url: str,
    filters: tuple[Filters, Places] | None = None,
) -> Candidates:
    """The k nearest photos for each described query; published as Parquet under `url`, and reused.

    `filters` has a row for each query photo, readable or not.
    """
    query_ids, descriptors = descriptor_shards.read_descriptors(queries)
    candidates = _kept_candidates(url, query_ids, manifest.num_images)
    if candidates is not None:
        if candidates.generation != manifest.generation:
            raise UserError(
                f"{url} belongs to generation {candidates.generation} of the index, which is now at "
                f"{manifest.generation}; "
                "expected the same generation, or another output"
            )
        say("retrieve: finished earlier, skipped")
        return candidates
    reduction = read_reduction(index, manifest)
    if reduction is not None:
        descriptors = reduction(descriptors)
    request = SearchRequest(index, manifest, descriptors, k)
    if filters is not None:
        request = SearchRequest(index, manifest, descriptors, k, filters[0].of_queries(query_ids), filters[1])
    found, seconds = search_shards(request, config)
    candidates = Candidates(query_ids, *found, seconds, manifest.generation)
    _write_candidates(url, candidates)
    return candidates


def search_shards(request: SearchRequest, config: SearchConfig) -> tuple[Found, float]:
    """The k nearest over all shards (Q, k), or as many as there are, and the seconds of work.

    Raises `IncompleteRunError` if a shard gave no answer: results are never from only some of the shards.
    """
    manifest = request.manifest
    alone, groups = [range(n, n + 1) for n in range(len(manifest.shards))], groups_of_shards(manifest)
    is_rescored = choose.KINDS[IndexKind(manifest.kind)].is_rescored
    num_actors = min(
        len(alone if is_rescored else groups),
        config.num_actors or max(1, int(job_cpus() // 2)),
    )
    effort = Effort(**manifest.effort)
    if config.num_probes is not None:
        effort = Effort(config.num_probes, effort.num_rescored)
    num_gpus = _gpus_per_actor(IndexKind(manifest.kind), config)
    make_actor = _ShardActor.options(num_cpus=cpus_of_a_shard(), num_gpus=num_gpus).remote
    reference = ray.put(request)
    # A second try would read a whole shard again, from the storage that most likely made the first one late.
    with SupervisedPool[_Unit](
        lambda: make_actor(reference, effort, config), num_actors, "retrieve", second_tries=False
    ) as pool:
        work = _Work(pool, request.index)
        length = short_list_length(manifest, effort, request.k)
        best: list[Found] = []

        def merge(found: Found) -> None:
            best[:] = [merge_top_k([*best, found], length)]

        work.on_shards("retrieve", groups, None, merge)
        if is_rescored:
            ids = best[0][1]
            distances = np.full(ids.shape, np.inf, np.float32)
            work.on_shards("rescore", alone, ray.put(ids), lambda found: np.minimum(distances, found, out=distances))
            best = [merge_top_k([(distances, ids)], request.k)]
    return best[0], work.seconds


def _gpus_per_actor(kind: IndexKind, config: SearchConfig) -> float:
    """What an actor reserves: kinds other than flat have no use for a GPU. Raises `UserError` where faiss has none."""
    if not config.num_gpus_per_actor:
        return 0.0
    if kind is not IndexKind.flat:
        say(f"index.num_gpus_per_actor: an index of kind {kind} is searched on CPUs; no GPU is reserved for it")
        return 0.0
    if ray.get_runtime_context().namespace == ALONE:  # elsewhere the nodes' faiss is not this one
        check_faiss_has_gpus()
    return config.num_gpus_per_actor


@dataclass(frozen=True)
class _Unit:
    """Shards to search together, or (with short lists) a shard to rescore."""

    shards: range
    short_lists: Any = None


class _Work:
    """Sends requests to all shards, and adds up the seconds."""

    def __init__(self, pool: SupervisedPool[_Unit], index: str) -> None:
        self.pool = pool
        self.index = index
        self.seconds = 0.0

    def on_shards(
        self, what: str, groups: Sequence[range], short_lists: Any, on_answer: Callable[[Any], object]
    ) -> None:
        """`on_answer` is called with each group's answer, in no fixed order."""
        with Progress(what, groups[-1].stop, "shards") as progress:

            def on_done(number: int, answer: tuple[Any, float]) -> None:
                on_answer(answer[0])
                self.seconds += answer[1]
                progress.add(len(groups[number]))

            failed = self.pool.run({n: _Unit(group, short_lists) for n, group in enumerate(groups)}, on_done)
            if failed:
                raise IncompleteRunError(
                    "; ".join(f"{_named(groups[n])} of {self.index}: {why}" for n, why in failed.items())
                )


def _named(group: range) -> str:
    """Names of shards, for messages."""
    return f"shard {group.start:05d}" if len(group) == 1 else f"one of shards {group.start:05d} to {group[-1]:05d}"


@ray.remote
class _ShardActor(PoolActor):
    """Searches one group of shards at a time."""

    def __init__(self, request: SearchRequest, effort: Effort, config: SearchConfig) -> None:
        self.request = request
        self.effort = effort
        self.num_threads = config.num_threads_per_actor
        cache = LocalCache(cache_directory(config.cache_dir), int(config.cache_gib * 2**30))
        self.opened = OpenIndex(request.index, request.manifest, cache, memory_map=config.memory_map, has_gpu=has_gpu())
        self.visits = self.opened.visits(request.queries, effort, self.num_threads)

    def run(self, unit: _Unit) -> tuple[Any, float]:
        started_s = time.perf_counter()
        found = self._searched(unit.shards) if unit.short_lists is None else self._rescored(unit)
        return found, time.perf_counter() - started_s

    def _searched(self, group: range) -> Found:
        request, shard = self.request, self.opened.joined(group)
        length = short_list_length(request.manifest, self.effort, request.k)
        if request.filters is None or request.places is None:
            return search(
                shard,
                request.queries,
                length,
                num_threads=self.num_threads,
                effort=self.effort,
                at_least=request.k,
                visits=self.visits,
            )
        return search_filtered(
            shard,
            request.queries,
            length,
            request.filters,
            request.places,
            num_threads=self.num_threads,
            effort=self.effort,
            at_least=request.k,
            visits=self.visits,
        )

    def _rescored(self, unit: _Unit) -> NDArray[np.float32]:
        (number,) = unit.shards
        return rescore(
            self.opened.descriptors(number),
            self.opened.ids(number),
            self.request.queries,
            ray.get(unit.short_lists),
            num_threads=self.num_threads,
        )


def _write_candidates(url: str, candidates: Candidates) -> None:
    table = pa.table(
        {
            "query_id": pa.array(candidates.query_ids),
            "candidates": pa.array(list(candidates.ids), pa.list_(pa.int64())),
            "squared_distances": pa.array(list(candidates.squared_distances), pa.list_(pa.float32())),
        },
        schema=CANDIDATES_SCHEMA,
    ).replace_schema_metadata({"seconds": repr(candidates.seconds), "generation": str(candidates.generation)})
    sealed.write_parquet(url, table)


def _kept_candidates(url: str, query_ids: NDArray[np.int64], num_images: int) -> Candidates | None:
    """The earlier result for these queries; None if there is none or (with a warning) it is damaged."""
    try:
        candidates = read_candidates(url)
        if candidates is None:
            return None
        ids = candidates.ids
        if not np.array_equal(candidates.query_ids, query_ids) or not ((ids >= NO_ID) & (ids < num_images)).all():
            raise sealed.DamagedFileError(url, "it belongs to other queries or another index", MADE_ANEW)
        return candidates
    except sealed.DamagedFileError as error:
        sealed.warn(error)
        return None


def read_candidates(url: str) -> Candidates | None:
    """The published result, or None if there is no file. Raises `UserError` if it is damaged."""
    table = sealed.read_parquet(url, CANDIDATES_SCHEMA, MADE_ANEW)
    if table is None:
        return None
    num_queries = table.num_rows
    try:
        distances, ids = (
            table.column(name).combine_chunks().flatten().to_numpy().reshape(num_queries, -1 if num_queries else 0)
            for name in ("squared_distances", "candidates")
        )
        about = table.schema.metadata or {}
        seconds, generation = float(about[b"seconds"]), int(about[b"generation"])
    except (KeyError, ValueError, pa.ArrowException) as error:
        raise sealed.DamagedFileError(url, storage.reason(error), MADE_ANEW) from error
    if distances.shape != ids.shape or not math.isfinite(seconds):
        raise sealed.DamagedFileError(url, "its columns do not fit", MADE_ANEW)
    return Candidates(table.column("query_id").to_numpy(), distances, ids, seconds, generation)
