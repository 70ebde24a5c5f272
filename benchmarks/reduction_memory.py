"""Peak memory of a file of wide descriptors becoming a reduced index: `python benchmarks/reduction_memory.py FOLDER`.

Draws a file of float16 rows below FOLDER (deleted at the end), copies it into described shards, learns the reduction
and reduces all shards, one after another in this process. Prints seconds and the process's peak memory so far.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import numpy as np

from pairvpr.data import storage
from pairvpr.data.descriptor_file import open_descriptors
from pairvpr.data.manifest import Manifest
from pairvpr.distributed.parts import copy_shard
from pairvpr.index import descriptor_shards, make
from pairvpr.index.reduction import reduced

ROWS_DRAWN = 8192
"""Different rows at a time; each block of them is turned, so that all differ."""


def draw(file: Path, num_rows: int, width: int) -> None:
    """Rows around a line of falling variances, and their paths."""
    rng = np.random.default_rng(0)
    block = (rng.normal(size=(ROWS_DRAWN, width)) * np.geomspace(1, 0.05, width)).astype(np.float16)
    with file.open("wb") as sink:
        head = {"descr": "<f2", "fortran_order": False, "shape": (num_rows, width)}
        np.lib.format.write_array_header_1_0(sink, head)
        for first in range(0, num_rows, ROWS_DRAWN):
            sink.write(np.roll(block, first // ROWS_DRAWN % 7, axis=1)[: num_rows - first].tobytes())
    with file.with_suffix(".txt").open("w") as sink:
        sink.writelines(f"{i:08d}.jpg\n" for i in range(num_rows))


def main() -> None:
    """Draw, copy, learn, reduce."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--reduce-to", type=int, default=512)
    parser.add_argument("--shards", type=int, default=8)
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    directory, started_s = str(options.folder / "index"), time.perf_counter()

    def say(step: str) -> None:
        peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{step:<28}{time.perf_counter() - started_s:>8.0f} s   peak {peak_gib:.2f} GiB", flush=True)

    try:
        draw(options.folder / "rows.npy", options.rows, options.width)
        say("drawn")
        file = open_descriptors(str(options.folder / "rows.npy"), "file")
        photos = Manifest.of(str(options.folder), file.paths)
        rows = file.rows_of(photos)
        for shard in descriptor_shards.shard_ranges(len(photos), options.shards):
            copy_shard(directory, shard, file.url, file.width, rows[shard.first_id : shard.stop_id], 0)
        say(f"copied into {options.shards} shards")
        draft = make.first_generation(
            directory, photos, options.shards, {"name": "drawn", "weights_sha256": ""}, file.width
        )
        made = reduced(directory, draft, options.reduce_to, make.LocalRunner())
        assert made.descriptor_dim == options.reduce_to
        say("learnt and reduced")
    finally:
        storage.remove_tree(str(options.folder))


if __name__ == "__main__":
    main()
