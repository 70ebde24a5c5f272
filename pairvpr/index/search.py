"""Exact nearest neighbours with faiss, in an order that does not depend on how the rows are cut.

Q queries, G descriptor width, k results.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from pairvpr.data import storage
from pairvpr.errors import UserError
from pairvpr.index import store
from pairvpr.index.merge import Found, merge_top_k

QUERIES_PER_CALL = 256


@dataclass(frozen=True)
class Shard:
    """A faiss index and the image id of each of its rows, ascending."""

    index: Any
    ids: NDArray[np.int64]


def flat_index(descriptors: NDArray[np.float32]) -> Any:
    """An exact faiss index (squared L2) over rows (n, G)."""
    index = faiss.IndexFlatL2(descriptors.shape[1])
    index.add(np.ascontiguousarray(descriptors))  # type: ignore[call-arg]
    return index


def load_shard(directory: str, shard: int, expected_sha256: str) -> Shard:
    """A shard of an index directory. Raises `UserError`, naming the file, where its bytes have changed."""
    url = store.shard_url(directory, shard, "index.faiss")
    if storage.sha256(url) != expected_sha256:
        raise UserError(f"{url} is damaged: its sha256 is not the manifest's; build the index again")
    ids = np.asarray(store.read_array(store.shard_url(directory, shard, "ids.npy")))
    if storage.is_local(url):
        return Shard(faiss.read_index(url.removeprefix("file://")), ids)
    with tempfile.TemporaryDirectory(prefix="pairvpr-") as folder:
        local = Path(folder) / "index.faiss"
        local.write_bytes(storage.read_bytes(url))
        return Shard(faiss.read_index(str(local)), ids)


def search(shard: Shard, queries: NDArray[np.float32], k: int, *, num_threads: int) -> Found:
    """The k nearest rows of each query (Q, G), or all rows if there are fewer; equal distances by id.

    Queries go through faiss in blocks of `QUERIES_PER_CALL`, cut by position, so that distances are rounded the
    same way whatever the shard.
    """
    faiss.omp_set_num_threads(num_threads)
    blocks = [
        _search_block(shard, np.ascontiguousarray(queries[first : first + QUERIES_PER_CALL]), k)
        for first in range(0, len(queries), QUERIES_PER_CALL)
    ]
    if not blocks:
        return np.empty((0, 0), np.float32), np.empty((0, 0), np.int64)
    return np.concatenate([block[0] for block in blocks]), np.concatenate([block[1] for block in blocks])


def _search_block(shard: Shard, queries: NDArray[np.float32], k: int) -> Found:
    """faiss keeps any of the rows that tie at the k-th place; ask for more until every such tie is in sight."""
    num_rows = shard.index.ntotal
    num_asked = min(k + 1, num_rows)
    while True:
        if num_rows == 0:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        distances, rows = shard.index.search(queries, num_asked)
        if num_asked == num_rows or (distances[:, k - 1] < distances[:, -1]).all():
            break
        num_asked = min(2 * num_asked, num_rows)
    return merge_top_k([(distances, shard.ids[rows])], k)
