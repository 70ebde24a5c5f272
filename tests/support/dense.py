"""Stores of made-up dense features, filled on this machine without a network and without Ray."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pairvpr.config.schema import StoredAs
from pairvpr.retrieval import dense_store
from pairvpr.retrieval.dense_store import Layout

LAYOUT = Layout(features="float32", values="float16", num_patches=100, width=200)
IDS = np.arange(0, 6000, 3)


def made_up(image_id: int) -> Tensor:
    """Something of its own for each image."""
    return torch.full((LAYOUT.num_patches, LAYOUT.width), float(image_id)) + torch.arange(LAYOUT.width)


def fill_store(directory: str) -> None:
    """Fill a store of `IDS`, as a process of its own does that may be killed."""
    dense_store.SHARD_BYTES = 100 * LAYOUT.record_bytes
    print("ready", flush=True)
    shards = dense_store.cut(IDS, LAYOUT)
    for shard, row in enumerate(dense_store.read_rows(directory, shards, LAYOUT)):
        if row is None:
            features = map(made_up, shards[shard].tolist())
            dense_store.write_shard(directory, shard, shards[shard], LAYOUT, features)
    dense_store.finish(directory, shards, LAYOUT, {"stored_as": str(StoredAs.half)})
