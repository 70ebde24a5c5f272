"""Re-ranking holds what the settings say and no more, however many candidates pass by."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pairvpr.config.schema import DenseFeatures
from tests.support.runs import ROOT

FEATURES_BYTES = 529 * 768 * 4
CACHE_PHOTOS, NUM_DATABASE, NUM_CANDIDATES, NUM_QUERIES = 20, 160, 40, 8
BATCH_SIZE = 4
UNIT_BYTES = NUM_QUERIES * (3 + 2) * FEATURES_BYTES
"""Queries: as read, as first images, with positions; keys and values of the one block."""
PAIR_BYTES = 16 * FEATURES_BYTES
"""A forward pass: tokens, keys and values of candidates, what a block makes of them meanwhile."""
ALLOWED_BYTES = 40 << 20
"""What the allocator leaves between tensors, and the threads that load photos."""
CODE = """
import sys
from tests.unit.test_rerank_memory import peaks
print(*peaks(sys.argv[1], sys.argv[2]))
"""


def peaks(folder: str, dense_features: str) -> list[int]:
    """This process's peak memory with the network loaded, when the cache is full, and after all candidates."""
    from unittest.mock import patch

    import numpy as np
    import torch
    from PIL import Image

    from pairvpr.config.benchmark_schema import ToyCityConfig
    from pairvpr.config.schema import DecoderConfig, EncoderConfig, EvaluateConfig, ModelConfig, RerankConfig, StoredAs
    from pairvpr.data.manifest import Benchmark, Manifest
    from pairvpr.models.weights import build_model, load_weights
    from pairvpr.retrieval import dense_store
    from pairvpr.retrieval.dense_store import DenseStore, Layout
    from pairvpr.retrieval.describe import Describer
    from pairvpr.retrieval.pipeline import photo_reranker
    from pairvpr.retrieval.rerank import WorkUnit

    torch.set_num_threads(1)
    model = ModelConfig(
        encoder=EncoderConfig(embed_dim=64, depth=1, num_heads=2, num_trainable_blocks=1),
        decoder=DecoderConfig(depth=1),
    )
    rerank = RerankConfig(
        dense_features=DenseFeatures(dense_features),
        cache_gib=CACHE_PHOTOS * FEATURES_BYTES / 2**30,
        batch_size=BATCH_SIZE,
        num_threads_per_actor=1,
    )
    config = EvaluateConfig(output=folder, benchmark=ToyCityConfig(name="toy_city"), model=model, rerank=rerank)
    noise = np.random.default_rng(0).integers(0, 255, (322, 322, 3), dtype=np.uint8)
    names = [f"{number:03d}.png" for number in range(NUM_DATABASE)]
    for number, name in enumerate(names):
        Image.fromarray(np.roll(noise, number, axis=0)).save(Path(folder) / name, compress_level=0)
    photos = Manifest.of(folder, names)
    benchmark = Benchmark(name="noise", database=photos, queries=photos, positives=None, protocol={})
    describer = Describer(build_model(model, load_weights(model), torch.device("cpu")), 1)
    stored = None
    if dense_features == DenseFeatures.store:
        directory, layout = f"{folder}/dense", Layout.of_model(model, StoredAs.half)
        with patch.object(dense_store, "SHARD_BYTES", 30 * layout.record_bytes):
            shards = dense_store.cut(np.arange(NUM_DATABASE), layout)
            for shard, ids in enumerate(shards):
                features = (torch.full((529, 768), float(number)) for number in ids)
                dense_store.write_shard(directory, shard, ids, layout, features)
            dense_store.finish(directory, shards, layout, {})
        stored = DenseStore.open(directory).read
    reranker = photo_reranker(benchmark, describer, config, stored)
    found = [_peak_bytes()]
    for first in range(0, NUM_DATABASE, NUM_CANDIDATES):
        candidates = range(first, first + NUM_CANDIDATES)
        reranker.rerank(WorkUnit(first, dict.fromkeys(range(NUM_QUERIES), candidates)))
        found.append(_peak_bytes())
    return [found[0], found[1], found[-1]]


def _peak_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is in KiB on Linux alone")
@pytest.mark.parametrize("dense_features", list(DenseFeatures))
def test_memory_does_not_grow_with_the_candidates(tmp_path: Path, dense_features: DenseFeatures) -> None:
    """The first unit has twice as many candidates as the cache holds, all units together eight times as many."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path), dense_features],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    before, full, last = map(int, done.stdout.split())
    cache = CACHE_PHOTOS * FEATURES_BYTES if dense_features is DenseFeatures.cache else 0
    assert full - before < cache + UNIT_BYTES + BATCH_SIZE * PAIR_BYTES + ALLOWED_BYTES
    others = (NUM_DATABASE - NUM_CANDIDATES) * FEATURES_BYTES
    assert last - full < ALLOWED_BYTES < others / 4
