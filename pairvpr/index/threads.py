"""How many CPU threads faiss uses, without changing those of others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import faiss as faiss_module

faiss: Any = faiss_module


@contextmanager
def faiss_threads(num_threads: int) -> Iterator[None]:
    """faiss uses `num_threads` inside the block; after it, the calling thread has the number that it had before.

    torch and faiss may share one OpenMP: its number of threads is then that of torch, too. OpenMP keeps a number for
    each calling thread, so several threads may be inside at once, each with its own.
    """
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(num_threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
