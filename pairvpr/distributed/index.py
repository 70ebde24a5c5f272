"""Index shards built by Ray tasks, searched by shard actors. G descriptor width, Q queries, k results."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray

from pairvpr.config.schema import SearchConfig
from pairvpr.data import storage
from pairvpr.data.manifest import Manifest
from pairvpr.distributed.pool import PoolActor, SupervisedPool
from pairvpr.distributed.progress import Progress, say
from pairvpr.distributed.runtime import cpus_of_a_shard
from pairvpr.errors import IncompleteRunError
from pairvpr.index import build, store
from pairvpr.index.merge import Found, merge_top_k
from pairvpr.index.search import load_shard, search


def build_index(directory: str, images: Manifest, num_shards: int, model: dict[str, str], descriptor_dim: int) -> None:
    """Make an index of a finished description; a finished index is kept."""
    if store.read_manifest(directory) is not None:
        say("index: finished earlier, skipped")
        return
    progress = Progress("index", num_shards, "shards")
    refs = [_build_shard.options(num_cpus=cpus_of_a_shard()).remote(directory, shard) for shard in range(num_shards)]
    shards = []
    for ref in refs:
        shards.append(ray.get(ref))
        progress.add(1)
    store.write_manifest(
        directory,
        store.IndexManifest(
            model=model,
            descriptor_dim=descriptor_dim,
            num_images=len(images),
            images_root=images.root,
            shards=shards,
        ),
    )
    progress.finish()


@ray.remote(max_retries=3, retry_exceptions=True)
def _build_shard(directory: str, shard: int) -> dict[str, Any]:
    return build.build_shard(directory, shard)


@dataclass(frozen=True)
class Candidates:
    """Retrieval's answer for the queries that could be read: ids (Q,), candidates and squared distances (Q, k)."""

    query_ids: NDArray[np.int64]
    squared_distances: NDArray[np.float32]
    ids: NDArray[np.int64]
    seconds: float


def retrieve(index: str, queries: str, k: int, config: SearchConfig, url: str) -> Candidates:
    """The k nearest photos of an index for each described query; kept as Parquet under `url`, and reused."""
    if storage.exists(url):
        say("retrieve: finished earlier, skipped")
        return read_candidates(url)
    manifest = store.read_manifest(index)
    assert manifest is not None, f"{index} is not finished"
    query_ids, descriptors = store.read_descriptors(queries)
    num_actors = min(len(manifest.shards), config.num_actors or max(1, int(ray.cluster_resources().get("CPU", 2) // 2)))
    search_args = (index, manifest, ray.put(descriptors), k, config.num_threads_per_actor)

    progress = Progress("retrieve", len(manifest.shards), "shards")
    parts: list[Found] = []
    seconds: list[float] = []

    def merge(_: int, answer: tuple[Found, float]) -> None:
        parts[:] = [merge_top_k([*parts, answer[0]], k)]
        seconds.append(answer[1])
        progress.add(1)

    make_actor = _ShardActor.options(num_cpus=cpus_of_a_shard()).remote
    with SupervisedPool[int](lambda: make_actor(*search_args), num_actors, "retrieve") as pool:
        failed = pool.run({shard: shard for shard in range(len(manifest.shards))}, merge)
    if failed:
        raise IncompleteRunError("; ".join(f"shard {shard:05d} of {index}: {why}" for shard, why in failed.items()))
    candidates = Candidates(query_ids, *parts[0], sum(seconds))
    _write_candidates(url, candidates)
    progress.finish()
    return candidates


@ray.remote
class _ShardActor(PoolActor):
    """Searches one shard at a time; a unit is a shard's number, its answer the best of that shard."""

    def __init__(
        self,
        index: str,
        manifest: store.IndexManifest,
        queries: NDArray[np.float32],
        k: int,
        num_threads: int,
    ) -> None:
        self.index = index
        self.manifest = manifest
        self.queries = queries
        self.k = k
        self.num_threads = num_threads

    def run(self, unit: int) -> tuple[Found, float]:
        started_s = time.perf_counter()
        shard = load_shard(self.index, unit, self.manifest.shards[unit]["sha256"])
        found = search(shard, self.queries, self.k, num_threads=self.num_threads)
        return found, time.perf_counter() - started_s


def _write_candidates(url: str, candidates: Candidates) -> None:
    table = pa.table(
        {
            "query_id": pa.array(candidates.query_ids),
            "candidates": pa.array(list(candidates.ids), pa.list_(pa.int64())),
            "squared_distances": pa.array(list(candidates.squared_distances), pa.list_(pa.float32())),
        }
    ).replace_schema_metadata({"seconds": repr(candidates.seconds)})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    storage.write_bytes(url, sink.getvalue())


def read_candidates(url: str) -> Candidates:
    """What `retrieve` kept."""
    table = pq.read_table(io.BytesIO(storage.read_bytes(url)))
    num_queries = table.num_rows
    distances, ids = (
        table.column(name).combine_chunks().flatten().to_numpy().reshape(num_queries, -1 if num_queries else 0)
        for name in ("squared_distances", "candidates")
    )
    seconds = float((table.schema.metadata or {})[b"seconds"])
    return Candidates(table.column("query_id").to_numpy(), distances, ids, seconds)
