"""A report of 100,000 queries over 1,000,000 database photos: under two minutes and 2 GiB, and a map that moves."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pairvpr.data import sealed
from pairvpr.data.manifest import Benchmark, Manifest
from pairvpr.evaluation.predictions_file import SCHEMA
from pairvpr.evaluation.report import metrics
from tests.support.browser import browser, opened, require_browser
from tests.support.finished import FACTS, write_files
from tests.support.small import small_model_config

ROOT = Path(__file__).parents[2]
GIB = 1 << 30


def write_large_run(folder: Path, num_queries: int, num_database: int, num_candidates: int) -> None:
    """Predictions at random: no photo is there."""
    rng = np.random.default_rng(0)
    database_m = rng.uniform(0, 30_000, (num_database, 2))
    at = rng.integers(num_database, size=num_queries)
    queries_m = database_m[at] + rng.normal(0, 10, (num_queries, 2))
    benchmark = Benchmark(
        name="large",
        database=Manifest.of("/photos/d", [f"sequence/{number:07d}.jpg" for number in range(num_database)], database_m),
        queries=Manifest.of("/photos/q", [f"{number:06d}.jpg" for number in range(num_queries)], queries_m),
        positives=None,
        protocol={},
    )
    content = metrics(benchmark, [], small_model_config(), FACTS)
    content["protocol"]["num_queries"] = num_queries
    write_files(folder, benchmark, content)
    candidates = rng.integers(num_database, size=(num_queries, num_candidates))
    candidates[rng.random(num_queries) < 0.8, 0] = -1
    candidates[:, 0] = np.where(candidates[:, 0] < 0, at, candidates[:, 0])
    reranked = candidates[:, :100][:, ::-1].copy()
    moved = rng.random(num_queries) < 0.7
    reranked[moved] = candidates[moved, :100]

    def lists(values: np.ndarray, kind: pa.DataType) -> pa.Array:
        offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.ravel(), kind))

    numbers = pa.array(np.arange(num_queries))
    scores = lists(np.sort(rng.normal(0, 2, reranked.shape))[:, ::-1].astype(np.float32), pa.float32())
    columns = [
        *(numbers, pa.array(benchmark.queries.paths), lists(candidates, pa.int64())),
        lists(rng.random(candidates.shape, np.float32), pa.float32()),
        *(lists(reranked, pa.int64()), scores, lists(at[:, None], pa.int64())),
        *(pa.array(rng.random(num_queries, np.float32)), pa.nulls(num_queries, pa.bool_())),
    ]
    sealed.write_parquet(str(folder / "predictions.parquet"), pa.table(columns, schema=SCHEMA))


def make(folder: Path) -> tuple[float, float]:
    """Seconds and GiB of `pairvpr report`, in a process of its own."""
    code = """
import re, sys
from pathlib import Path
from pairvpr.cli import main
code = main()
print(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
sys.exit(code)
"""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, "report", str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return time.perf_counter() - start, int(done.stdout.splitlines()[-1]) * 1024 / GIB


@pytest.mark.slow
def test_predictions_are_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    """Ten times the queries: memory grows by less than half of their file."""
    write_large_run(tmp_path / "few", 2_000, 20_000, 1000)
    write_large_run(tmp_path / "many", 20_000, 20_000, 1000)
    (_, few_gib), (_, many_gib) = make(tmp_path / "few"), make(tmp_path / "many")
    size = (tmp_path / "many" / "predictions.parquet").stat().st_size / GIB
    assert size > 0.1
    assert many_gib - few_gib < 0.5 * size
    assert "queries are pictured" in (tmp_path / "many" / "report.html").read_text()


@pytest.mark.soak
def test_100_000_queries_over_a_million_photos(tmp_path: Path) -> None:
    require_browser()
    write_large_run(tmp_path, 100_000, 1_000_000, 1000)
    seconds, gib = make(tmp_path)
    size_mb = (tmp_path / "report.html").stat().st_size / 1e6
    print(f"{seconds:.1f} s, {gib:.2f} GiB, a page of {size_mb:.1f} MB")
    assert seconds < 120
    assert gib < 2
    assert size_mb < 10
    with browser() as running, opened(running, tmp_path / "report.html") as seen:
        frames = seen.page.evaluate(
            """() => new Promise((done) => {
            const canvas = document.getElementById('canvas'), start = performance.now();
            let frames = 0;
            const next = () => {
                canvas.dispatchEvent(new KeyboardEvent('keydown', {key: frames % 2 ? 'ArrowLeft' : 'ArrowRight'}));
                frames += 1;
                const seconds = (performance.now() - start) / 1000;
                if (seconds < 3) requestAnimationFrame(next); else done(frames / seconds);
            };
            requestAnimationFrame(next);
        })"""
        )
        print(f"{frames:.0f} frames a second")
        assert "thinned out: " in seen.page.locator("#map-status").text_content()
        assert frames > 20
