"""From described shards to faiss shards: train once on a sample, then add shard by shard, one in memory at a time.

n rows, G descriptor width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from pairvpr.config.schema import IndexKind
from pairvpr.data import storage
from pairvpr.data.local_cache import LocalCache
from pairvpr.errors import UserError
from pairvpr.index import choose, descriptor_shards
from pairvpr.index.generations import StoredFile
from pairvpr.index.threads import faiss_threads

ROWS_PER_RUN = 8
"""Consecutive rows per run of a sample: remote files are read run by run."""
TRAINING_SEED = 1234


@dataclass(frozen=True)
class IndexSpec:
    """What is built: a kind (not `auto`) and its number of lists."""

    kind: IndexKind
    num_lists: int = 0

    @property
    def factory(self) -> str:
        """faiss's name of it."""
        return choose.factory_string(self.kind, self.num_lists)

    def index_file(self, trained: StoredFile | None) -> str:
        """Name of a shard's faiss file; each kind and each training has its own, so several can coexist."""
        if trained is not None:
            return trained.path.replace("trained-", "index-", 1)
        return "index.faiss" if self.kind is IndexKind.flat else f"index-{self._slug}.faiss"

    def trained_file(self, learnt_from: Sequence[StoredFile], num_threads: int) -> str:
        """Name of the trained, empty index that all shards share; it contains a digest of its inputs."""
        about = [num_threads, *(file.sha256 for file in learnt_from)]
        return f"trained-{self._slug}-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]}.faiss"

    @property
    def _slug(self) -> str:
        return self.factory.lower().replace(",", "-")


def spec_of(kind: str, factory: str) -> IndexSpec:
    """The spec that a manifest names."""
    num_lists = int(factory.split(",")[0].removeprefix("IVF")) if factory.startswith("IVF") else 0
    return IndexSpec(IndexKind(kind), num_lists)


def spread_runs(num_rows: int, num_wanted: int, run: int = ROWS_PER_RUN) -> list[range]:
    """About `num_wanted` of the rows 0..n-1, evenly spread in short runs; all of them where there are no more."""
    num_runs = max(1, num_wanted // run)
    if num_rows <= num_runs * run:
        return [range(num_rows)]
    firsts = (np.arange(num_runs) * (num_rows - run)) // max(1, num_runs - 1) if num_runs > 1 else np.array([0])
    return [range(first, first + run) for first in firsts.tolist()]


def read_sample(urls: Sequence[str], counts: Sequence[int], runs: Sequence[range]) -> NDArray[np.float32]:
    """The rows of `runs`, which count through the files `urls` of `counts` rows each."""
    pieces, stop = [], 0
    for url, count in zip(urls, counts, strict=True):
        start, stop = stop, stop + count
        inside = [range(max(run.start, start) - start, min(run.stop, stop) - start) for run in runs]
        inside = [run for run in inside if len(run)]
        if inside:
            pieces.append(descriptor_shards.read_some_rows(url, inside))
    return np.concatenate(pieces)


def held_out_runs(num_rows: int) -> list[range]:
    """Evenly spread rows that no index is trained on; they serve as queries when its recall is measured."""
    return spread_runs(num_rows, max(1, min(choose.NUM_HELD_OUT, num_rows // 4)), run=1)


def read_training_sample(
    spec: IndexSpec, urls: Sequence[str], counts: Sequence[int], descriptor_dim: int
) -> NDArray[np.float32]:
    """Training rows (m, G) from all shards, without the held-out ones; bounded by memory whatever n is."""
    num_rows = sum(counts)
    runs = spread_runs(num_rows, choose.num_training_rows(num_rows, descriptor_dim, spec.num_lists))
    sample = read_sample(urls, counts, runs)
    is_held_out = np.isin(_members(runs), _members(held_out_runs(num_rows)))
    is_measured = spec.num_lists > 0 and (~is_held_out).sum() >= spec.num_lists
    return sample[~is_held_out] if is_measured else sample


def _members(runs: Sequence[range]) -> NDArray[np.int64]:
    return np.concatenate([np.arange(run.start, run.stop) for run in runs])


def train(spec: IndexSpec, sample: NDArray[np.float32], num_threads: int) -> Any:
    """An empty index trained on `sample` (m, G). The same sample and number of threads give the same bytes."""
    index: Any = faiss.index_factory(sample.shape[1], spec.factory, faiss.METRIC_L2)
    if spec.num_lists:
        index.cp.seed, index.cp.niter = TRAINING_SEED, choose.NUM_ITERATIONS
        index.cp.min_points_per_centroid = 1
        index.cp.max_points_per_centroid = max(1, len(sample) // spec.num_lists + 1)
    with faiss_threads(num_threads):
        index.train(sample)
    return index


def write_faiss(directory: str, path: str, index: Any) -> StoredFile:
    """Publish a faiss index at a path below the directory."""
    with storage.written_locally(storage.join(directory, path)) as local:
        faiss.write_index(index, str(local))
        return StoredFile(path=path, bytes=local.stat().st_size, sha256=storage.sha256(str(local)))


def build_shard(
    directory: str, path: str, spec: IndexSpec, rows_file: str | Path, trained: Any | None, num_threads: int
) -> StoredFile:
    """Write the faiss index of a shard to `path`, whose descriptors are in `rows_file`, a few at a time.

    The same descriptors give the same bytes, so doing it twice, or at once in two places, is harmless.
    """
    rows = descriptor_shards.load_array(rows_file, np.float32, 2, directory, mmap_mode="r")
    index: Any = faiss.index_factory(rows.shape[1], spec.factory) if trained is None else faiss.clone_index(trained)
    if index.d != rows.shape[1]:
        raise UserError(
            f"{storage.join(directory, path)}: {rows.shape[1]} values per row, but the index has {index.d}; "
            "build the index again"
        )
    with faiss_threads(num_threads):
        for piece in rows_of_file(rows_file):
            index.add(piece)
    if spec.num_lists:
        index.quantizer.reset()  # all shards share the centres, which `OpenIndex` puts back
    return write_faiss(directory, path, index)


def rows_of_file(rows_file: str | Path) -> Iterator[NDArray[np.float32]]:
    """The rows of a .npy file, read and not mapped: mapped pages would count as memory of this process."""
    with Path(rows_file).open("rb") as file:
        np.lib.format.read_magic(file)
        (num_rows, width), _, dtype = np.lib.format.read_array_header_1_0(file)
        step = max(1, choose.BYTES_ADDED_AT_ONCE // (dtype.itemsize * width))
        for first in range(0, num_rows, step):
            yield np.fromfile(file, dtype, min(step, num_rows - first) * width).reshape(-1, width)


def read_trained(directory: str, file: StoredFile, cache: LocalCache) -> Any:
    """The empty index that shards share. Raises `UserError`, naming it, where its bytes have changed."""
    url = storage.join(directory, file.path)
    with cache.open(url, file.sha256, file.bytes) as path:
        return read_faiss(path, url)


def read_faiss(path: str, url: str, flags: int = 0) -> Any:
    """The faiss index in a file. Raises `UserError`, naming `url`, for what faiss can't read."""
    try:
        return faiss.read_index(path, flags)
    except RuntimeError as error:
        raise UserError(f"{url}: not a faiss index: {storage.reason(error)}; build the index again") from error
