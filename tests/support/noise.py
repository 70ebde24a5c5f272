"""Photos of noise and a small network whose features are of full size: what re-ranking holds in memory."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from pairvpr.config.benchmark_schema import ToyCityConfig
from pairvpr.config.schema import (
    DecoderConfig,
    DenseFeatures,
    EncoderConfig,
    EvaluateConfig,
    ModelConfig,
    RerankConfig,
    StoredAs,
)
from pairvpr.data.manifest import Benchmark, Manifest
from pairvpr.retrieval import dense_store
from pairvpr.retrieval.dense_store import Layout

FEATURES_BYTES = 529 * 768 * 4
CACHE_PHOTOS, NUM_DATABASE, NUM_CANDIDATES = 20, 320, 40
BATCH_SIZE = 4
QUERY_BYTES = (3 + 2) * FEATURES_BYTES
"""A unit's query: as read, as first images, with positions; keys and values of the one block."""
PAIR_BYTES = 16 * FEATURES_BYTES
"""A forward pass: tokens, keys and values of candidates, what a block makes of them meanwhile."""
ALLOWED_BYTES = 40 << 20
"""What the allocator leaves between tensors, and the threads that load photos, where one thread does the work."""
ACTOR_ALLOWED_BYTES = 96 << 20
"""The same in an actor of Ray, with Ray's threads beside them."""
OTHERS_BYTES = (NUM_DATABASE - NUM_CANDIDATES) * FEATURES_BYTES
"""Features of the candidates of all units but the first."""


def most_bytes(dense_features: DenseFeatures, num_queries: int) -> int:
    """What re-ranking may hold beside the network and what the allocator leaves."""
    cache = CACHE_PHOTOS * FEATURES_BYTES if dense_features is DenseFeatures.cache else 0
    return cache + num_queries * QUERY_BYTES + BATCH_SIZE * PAIR_BYTES


def noise_config(folder: Path, dense_features: DenseFeatures) -> EvaluateConfig:
    """A decoder of one block at 322 px, and a cache of few photos."""
    model = ModelConfig(
        encoder=EncoderConfig(embed_dim=64, depth=1, num_heads=2, num_trainable_blocks=1),
        decoder=DecoderConfig(depth=1),
    )
    rerank = RerankConfig(
        dense_features=dense_features,
        cache_gib=CACHE_PHOTOS * FEATURES_BYTES / 2**30,
        batch_size=BATCH_SIZE,
        num_threads_per_actor=1,
        num_actors=1,
    )
    return EvaluateConfig(output=str(folder), benchmark=ToyCityConfig(name="toy_city"), model=model, rerank=rerank)


def noise_photos(folder: Path) -> Benchmark:
    """`NUM_DATABASE` photos, which are the queries, too."""
    noise = np.random.default_rng(0).integers(0, 255, (322, 322, 3), dtype=np.uint8)
    names = [f"{number:03d}.jpg" for number in range(NUM_DATABASE)]
    for number, name in enumerate(names):
        Image.fromarray(np.roll(noise, number, axis=0)).save(folder / name)
    photos = Manifest.of(str(folder), names)
    return Benchmark(name="noise", database=photos, queries=photos, positives=None, protocol={})


def noise_store(folder: Path, config: EvaluateConfig) -> str | None:
    """A finished store of features for all photos, where the settings want one; they are not those of the photos."""
    if config.rerank.dense_features is not DenseFeatures.store:
        return None
    directory, layout = f"{folder}/dense", Layout.of_model(config.model, StoredAs.half)
    with patch.object(dense_store, "SHARD_BYTES", 30 * layout.record_bytes):
        shards = dense_store.cut(np.arange(NUM_DATABASE), layout)
        for shard, ids in enumerate(shards):
            features = (torch.full((529, 768), float(number)) for number in ids)
            dense_store.write_shard(directory, shard, ids, layout, features)
        dense_store.finish(directory, shards, layout, {})
    return directory
