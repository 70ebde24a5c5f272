"""An actor's resident memory stays within what the settings say, in every way to get dense features."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import ray

from pairvpr.config.schema import DenseFeatures
from pairvpr.distributed.rerank import rerank
from pairvpr.distributed.runtime import ModelSource
from pairvpr.models.weights import load_weights
from pairvpr.retrieval.rerank import WorkUnit
from tests.support.noise import (
    ACTOR_ALLOWED_BYTES,
    NUM_CANDIDATES,
    NUM_DATABASE,
    NUM_QUERIES,
    OTHERS_BYTES,
    bound,
    noise_config,
    noise_photos,
    noise_store,
)

pytestmark = pytest.mark.usefixtures("local_ray")
SECONDS_BETWEEN_LOOKS = 0.05


@contextmanager
def watched() -> Iterator[list[int]]:
    """Peak resident bytes of re-ranking actors, one number for each look at each of them."""
    seen, is_over = list[int](), threading.Event()

    def look() -> None:
        while not is_over.wait(SECONDS_BETWEEN_LOOKS):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                    if "_RerankActor" in " ".join(process.cmdline()):
                        peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
                        seen.extend([1024 * int(peak[1])] if peak else [])

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        is_over.set()
        thread.join()


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("dense_features", list(DenseFeatures))
def test_an_actors_memory_does_not_grow_with_the_candidates(tmp_path: Path, dense_features: DenseFeatures) -> None:
    """One pair, two units, all eight (sixteen times as many candidates as the cache holds), each with a new actor."""
    config, benchmark = noise_config(tmp_path, dense_features), noise_photos(tmp_path)
    store, source = noise_store(tmp_path, config), ModelSource(config.model, ray.put(load_weights(config.model)))
    units = [
        WorkUnit(
            number,
            dict.fromkeys(
                range(number * NUM_QUERIES, (number + 1) * NUM_QUERIES),
                range(number * NUM_CANDIDATES, (number + 1) * NUM_CANDIDATES),
            ),
        )
        for number in range(NUM_DATABASE // NUM_CANDIDATES)
    ]

    def peak_bytes(name: str, its: Sequence[WorkUnit]) -> int:
        with watched() as seen:
            answers = rerank(its, benchmark, source, config, str(tmp_path / name), store).by_query
        assert len(answers) == sum(len(unit.candidates) for unit in its)
        return max(seen)

    before = peak_bytes("pair", [WorkUnit(0, {0: [0]})])
    few, last = peak_bytes("few", units[:2]), peak_bytes("all", units)
    print(f"{dense_features}: {before >> 20} MiB at rest, {few >> 20} after two units, {last >> 20} after {len(units)}")
    assert last - before < bound(dense_features) + ACTOR_ALLOWED_BYTES
    assert last - few < ACTOR_ALLOWED_BYTES < OTHERS_BYTES / 4
