"""Exact nearest neighbours with faiss, in an order that does not depend on how the rows are cut.

Q queries, G descriptor width, k results.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from pairvpr.data import storage
from pairvpr.errors import UserError
from pairvpr.index import store
from pairvpr.index.merge import Found, merge_top_k

QUERIES_PER_CALL = 256
NEVER = 2**31 - 1


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


def load_shard(directory: str, shard: int, expected_sha256: Mapping[str, str]) -> Shard:
    """A shard of an index directory. Raises `UserError`, naming the file, where its bytes have changed.

    `expected_sha256` is the manifest's row, by file name.
    """
    index, ids = (
        _checked_bytes(store.shard_url(directory, shard, name), expected_sha256[name])
        for name in ("index.faiss", "ids.npy")
    )
    return Shard(faiss.deserialize_index(np.frombuffer(index, np.uint8)), np.load(io.BytesIO(ids), allow_pickle=False))


def _checked_bytes(url: str, expected_sha256: str) -> bytes:
    data = storage.read_bytes(url)
    if hashlib.sha256(data).hexdigest() != expected_sha256:
        raise UserError(f"{url} is damaged: its sha256 is not the manifest's; build the index again")
    return data


def search(shard: Shard, queries: NDArray[np.float32], k: int, *, num_threads: int) -> Found:
    """The k nearest rows of each query (Q, G), or all rows if there are fewer; equal distances by id.

    Every distance is computed by itself, so it is rounded the same way wherever its row lies. faiss would switch
    to BLAS for many queries, whose rounding depends on a row's place in a block: copies of a photo then differ by a
    step of float32, and so do the answers of differently cut shards.
    """
    faiss.omp_set_num_threads(num_threads)
    faiss.cvar.distance_compute_blas_threshold = NEVER
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
