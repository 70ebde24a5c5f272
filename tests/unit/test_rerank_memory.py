"""Re-ranking holds what the settings say and no more, however many candidates pass by."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pairvpr.config.schema import DenseFeatures
from tests.support.noise import (
    ALLOWED_BYTES,
    NUM_CANDIDATES,
    NUM_DATABASE,
    OTHERS_BYTES,
    most_bytes,
    noise_config,
    noise_photos,
    noise_store,
)
from tests.support.runs import ROOT

NUM_QUERIES = 2
CODE = """
import sys
from tests.unit.test_rerank_memory import peaks
print(*peaks(sys.argv[1], sys.argv[2]))
"""


def peaks(directory: str, dense_features: str) -> list[int]:
    """This process's peak memory with the network loaded, when the cache is full, and after all candidates."""
    import torch

    from pairvpr.models.weights import build_model, load_weights
    from pairvpr.retrieval.dense_store import DenseStore
    from pairvpr.retrieval.describe import Describer
    from pairvpr.retrieval.pipeline import photo_reranker
    from pairvpr.retrieval.rerank import WorkUnit

    torch.set_num_threads(1)
    folder = Path(directory)
    config, benchmark = noise_config(folder, DenseFeatures(dense_features)), noise_photos(folder)
    store = noise_store(folder, config)
    describer = Describer(build_model(config.model, load_weights(config.model), torch.device("cpu")), 1)
    stored = None if store is None else DenseStore.open(store).read
    reranker = photo_reranker(benchmark, describer, config.rerank, stored)
    found = [_peak_bytes()]
    for first in range(0, NUM_DATABASE, NUM_CANDIDATES):
        candidates = range(first, first + NUM_CANDIDATES)
        reranker.rerank(WorkUnit(first, dict.fromkeys(range(NUM_QUERIES), candidates)))
        found.append(_peak_bytes())
    return [found[0], found[1], found[-1]]


def _peak_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is in KiB on Linux alone")
@pytest.mark.parametrize(
    "dense_features",
    [DenseFeatures.cache, *(pytest.param(its, marks=pytest.mark.soak) for its in DenseFeatures if its != "cache")],
)
def test_memory_does_not_grow_with_the_candidates(tmp_path: Path, dense_features: DenseFeatures) -> None:
    """The first unit has twice as many candidates as the cache holds, all units together sixteen times as many."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path), dense_features],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    before, full, last = map(int, done.stdout.split())
    assert full - before < most_bytes(dense_features, NUM_QUERIES) + ALLOWED_BYTES
    assert last - full < ALLOWED_BYTES < OTHERS_BYTES / 4
