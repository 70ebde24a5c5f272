"""From described shards to faiss shards, and to the manifest that makes them an index."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np

from pairvpr.data import storage
from pairvpr.index import store
from pairvpr.index.search import flat_index

FILES = ("ids.npy", "descriptors.npy", "index.faiss")


def build_shard(directory: str, shard: int) -> dict[str, Any]:
    """Write the faiss index of a described shard; returns its row of the manifest.

    The same descriptors give the same bytes, so doing it twice, or at once in two places, is harmless.
    """
    about = store.read_shard_description(directory, shard)
    assert about is not None, f"shard {shard} of {directory} is not described"
    descriptors = np.asarray(store.read_array(store.shard_url(directory, shard, "descriptors.npy")))
    with storage.written_locally(store.shard_url(directory, shard, "index.faiss")) as path:
        faiss.write_index(flat_index(descriptors), str(path))
    urls = {name: store.shard_url(directory, shard, name) for name in FILES}
    return {
        "first_id": about.first_id,
        "count": about.count,
        "num_rows": about.num_rows,
        "bytes": {name: storage.size_bytes(url) for name, url in urls.items()},
        "sha256": {name: storage.sha256(url) for name, url in urls.items()},
    }
