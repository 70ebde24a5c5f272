"""How fast one CPU of this machine compares and stores descriptors: some seconds of faiss on random rows of width G."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import faiss
import numpy as np

from pairvpr.config.schema import IndexKind
from pairvpr.index import choose
from pairvpr.index.plan_cost import CpuRates
from pairvpr.index.search import QUERY_BITS
from pairvpr.index.threads import faiss_threads

NUM_ROWS, NUM_QUERIES = 16_384, 256
NUM_ROUNDS = 3
K = 100


def measured_cpu_rates(descriptor_dim: int, kinds: Sequence[IndexKind]) -> CpuRates:
    """The best of some rounds, with one thread. Codes are scanned without lists, query by query as in a list."""
    with faiss_threads(1):
        rows = np.random.default_rng(0).standard_normal((NUM_ROWS, descriptor_dim), np.float32)
        queries, centres = rows[:NUM_QUERIES], faiss.IndexFlatL2(descriptor_dim)
        centres.add(rows)  # type: ignore[call-arg]
        assigned_s = _best_s(lambda: centres.search(queries, 1))  # type: ignore[call-arg]
        scanned, added = dict[IndexKind, float](), dict[IndexKind, float]()
        for kind in kinds:
            index: faiss.Index = faiss.index_factory(descriptor_dim, choose.KINDS[kind].codec)
            index.train(rows)  # type: ignore[call-arg]
            if isinstance(index, faiss.IndexRaBitQ):
                index.qb = QUERY_BITS
            added[kind] = NUM_ROWS / _best_s(lambda index=index: (index.reset(), index.add(rows)))  # type: ignore[call-arg]
            seconds = _best_s(lambda index=index: index.search(queries, K))  # type: ignore[call-arg]
            scanned[kind] = NUM_ROWS * NUM_QUERIES / seconds
        return CpuRates(centres=NUM_ROWS * NUM_QUERIES / assigned_s, scanned=scanned, added=added)


def _best_s(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(NUM_ROUNDS):
        started_s = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started_s)
    return max(min(seconds), 1e-9)
