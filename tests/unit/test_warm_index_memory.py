"""What an open index holds in memory is what the plan says its shards take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pairvpr.config.schema import BuildConfig, IndexKind
from pairvpr.index.choose import index_bytes
from tests.support.index import write_index

NUM_ROWS, WIDTH, NUM_LISTS, NUM_SHARDS = 60_000, 64, 16, 4
HOLD = """
import ctypes, sys
from pathlib import Path
import numpy as np
from pairvpr.data.local_cache import LocalCache
from pairvpr.index.generations import read_manifest
from pairvpr.index.reader import WarmIndex, search_index

def held_bytes():
    ctypes.CDLL(None).malloc_trim(0)
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines["RssAnon"].split()[0])

directory, budget_bytes = sys.argv[1], float(sys.argv[2])
manifest, queries = read_manifest(directory), np.zeros((1, int(sys.argv[3])), np.float32)
small = WarmIndex(directory, manifest, LocalCache(Path(directory), 1 << 40), budget_bytes=0)
search_index(small, queries, 3, num_threads=1)  # what is loaded once, whatever the shards
before = held_bytes()
warm = WarmIndex(directory, manifest, LocalCache(Path(directory), 1 << 40), budget_bytes=budget_bytes)
print(warm.num_shards_kept, held_bytes() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts what Linux counts")
@pytest.mark.parametrize("kind", [IndexKind.flat, IndexKind.flat_8bit, IndexKind.ivf_fp16, IndexKind.ivf_rabitq])
def test_shards_in_memory_take_what_the_plan_says(kind: IndexKind, tmp_path: Path) -> None:
    """All shards, and with half of that as a budget at most so many; a fresh process, because freed memory lingers."""
    rows = np.random.default_rng(3).normal(size=(NUM_ROWS, WIDTH)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    has_lists = kind.startswith("ivf")
    config = BuildConfig(kind=kind, num_lists=NUM_LISTS if has_lists else None, num_build_threads=1)
    cuts = [NUM_ROWS // NUM_SHARDS * number for number in range(1, NUM_SHARDS)]
    write_index(str(tmp_path), [f"{row:06d}.jpg" for row in range(NUM_ROWS)], rows, cuts, config=config)
    planned_bytes = index_bytes(kind, NUM_ROWS, WIDTH, NUM_LISTS if has_lists else None)
    for budget_bytes in (float("inf"), planned_bytes / 2):
        line = [sys.executable, "-c", HOLD, str(tmp_path), str(budget_bytes), str(WIDTH)]
        done = subprocess.run(line, check=True, capture_output=True, text=True)
        num_kept, held_bytes = (int(word) for word in done.stdout.split())
        allowed_bytes = min(budget_bytes, planned_bytes)
        assert held_bytes < 1.02 * allowed_bytes + (256 << 10)
        if budget_bytes > planned_bytes:
            assert num_kept == NUM_SHARDS
            assert held_bytes > 0.95 * planned_bytes
        else:
            assert num_kept < NUM_SHARDS
