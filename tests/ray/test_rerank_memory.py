"""An actor's resident memory stays within what the settings say, in every way to get dense features."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from pairvpr.config.schema import DenseFeatures, RerankConfig
from pairvpr.distributed.network import ModelSource
from pairvpr.distributed.rerank import rerank
from pairvpr.distributed.runtime import plan_actors
from pairvpr.models.weights import load_weights
from pairvpr.retrieval.rerank import WorkUnit
from tests.support.noise import (
    ACTOR_ALLOWED_BYTES,
    NUM_CANDIDATES,
    NUM_DATABASE,
    OTHERS_BYTES,
    most_bytes,
    noise_config,
    noise_photos,
    noise_store,
)

pytestmark = pytest.mark.usefixtures("local_ray")
SECONDS_BETWEEN_LOOKS = 0.05
NUM_QUERIES = 4
"""With fewer, an actor is done before it has grown by what the test would notice."""


@contextmanager
def watched() -> Iterator[list[int]]:
    """Peak resident bytes of re-ranking actors that begin meanwhile, one number for each look at each of them."""
    seen, is_over = list[int](), threading.Event()
    earlier = {process.pid for process in _actors()}

    def look() -> None:
        while not is_over.wait(SECONDS_BETWEEN_LOOKS):
            for process in _actors():
                with suppress(FileNotFoundError, ProcessLookupError):
                    peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
                    seen.extend([1024 * int(peak[1])] if peak and process.pid not in earlier else [])

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        is_over.set()
        thread.join()


def _actors() -> Iterator[psutil.Process]:
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "_RerankActor" in " ".join(process.cmdline()):
                yield process


@ray.remote
class _Arenas:
    def most(self) -> str | None:
        return os.environ.get("MALLOC_ARENA_MAX")


def test_a_model_actor_keeps_few_malloc_arenas() -> None:
    actor: Any = _Arenas.options(**plan_actors(RerankConfig()).actor_options()).remote()
    assert ray.get(actor.most.remote()) == "2"


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

    def peak_bytes(name: str, some: Sequence[WorkUnit]) -> int:
        with watched() as seen:
            answers = rerank(some, benchmark, source, config.rerank, str(tmp_path / name), store).by_query
        assert len(answers) == sum(len(unit.candidates) for unit in some)
        return max(seen)

    before = peak_bytes("pair", [WorkUnit(0, {0: [0]})])
    few, last = peak_bytes("few", units[:2]), peak_bytes("all", units)
    peaks = [f"{peak >> 20} MiB after {what}" for what, peak in (("a pair", before), ("two units", few), ("all", last))]
    print(f"{dense_features}: {', '.join(peaks)}")
    assert last - before < most_bytes(dense_features, NUM_QUERIES) + ACTOR_ALLOWED_BYTES
    assert last - few < ACTOR_ALLOWED_BYTES < OTHERS_BYTES / 4
