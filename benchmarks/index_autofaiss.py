"""autofaiss on the same rows, for `benchmarks.index_at_size`; run by an interpreter of its own, which has autofaiss.

    PYTHON benchmarks/index_autofaiss.py ROWS_FOLDER QUERIES.npy OUTPUT_FOLDER MEMORY K

Writes `versions.json`, then `knn.index`, `ids.npy` and `about.json` into the output folder.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

NUM_THREADS = 2


def main() -> None:
    """Build, then ask all queries at once, with the search parameters that autofaiss chose."""
    rows, queries_file, output, memory, k = *map(Path, sys.argv[1:4]), sys.argv[4], int(sys.argv[5])
    autofaiss: Any = importlib.import_module("autofaiss")
    versions = {name: importlib.metadata.version(name) for name in ("autofaiss", "faiss-cpu", "numpy")}
    (output / "versions.json").write_text(json.dumps(versions))
    start_s = time.perf_counter()
    index, about = autofaiss.build_index(
        embeddings=str(rows),
        index_path=str(output / "knn.index"),
        index_infos_path=str(output / "infos.json"),
        max_index_memory_usage=memory,
        current_memory_available="8GB",
        metric_type="l2",
        nb_cores=NUM_THREADS,
    )
    build_s = time.perf_counter() - start_s
    queries = np.load(queries_file)
    index.search(queries[:32], k)
    start_s = time.perf_counter()
    _, ids = index.search(queries, k)
    search_s = time.perf_counter() - start_s
    np.save(output / "ids.npy", ids)
    told = {"build_s": build_s, "search_s": search_s, "about": {name: str(value) for name, value in about.items()}}
    (output / "about.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
