"""Is the download of a benchmark whole? Counts, a sample of photos, and one line for each problem."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pairvpr.config.benchmark_schema import BenchmarkConfig, MslsConfig, MslsSplit, MslsSubtask, ToyCityConfig
from pairvpr.config.schema import CheckBenchmarkConfig
from pairvpr.data import images
from pairvpr.data.benchmarks import read_benchmark
from pairvpr.data.manifest import Benchmark, Manifest
from pairvpr.data.problems import Problems
from pairvpr.errors import UserError
from pairvpr.secrets import without_secrets


@dataclass(frozen=True)
class Counts:
    """How many photos a benchmark has."""

    num_queries: int
    num_database: int


_PITTSBURGH_30K, _SFXL = 10_000, 2_805_840
WHOLE = {
    "msls_val": Counts(740, 18_871),
    "msls_test": Counts(1_135, 36_565),
    "nordland_2760": Counts(2_760, 27_592),
    "nordland_27592": Counts(27_592, 27_592),
    "pitts30k_val": Counts(7_608, _PITTSBURGH_30K),
    "pitts30k_test": Counts(6_816, _PITTSBURGH_30K),
    "pitts250k_test": Counts(8_280, 83_952),
    "tokyo247": Counts(315, 75_984),
    "sfxl_v1": Counts(1_000, _SFXL),
    "sfxl_v2": Counts(598, _SFXL),
    "sfxl_night": Counts(466, _SFXL),
    "sfxl_occlusion": Counts(76, _SFXL),
}
"""Published sizes of benchmarks, by name (method, section 7)."""
SIDE_PX = 8
"""To which an opened photo is scaled: only whether it can be read counts."""
NUM_CITIES, RADIUS_M = {MslsSplit.train_val: 2, MslsSplit.test: 6}, 25.0
"""Of the MSLS benchmarks that have these sizes."""


def check_benchmark(config: CheckBenchmarkConfig) -> list[str]:
    """Print counts and problems, one line each; returns the problems.

    Raises `UserError` for a benchmark that is not downloaded.
    """
    if isinstance(config.benchmark, ToyCityConfig):
        raise UserError("benchmark=toy_city: it is drawn by code; expected a benchmark that is downloaded")
    problems = Problems()
    with problems.gathered():
        benchmark = read_benchmark(config.benchmark, "", problems)
        _check_counts(benchmark, _whole(config.benchmark), problems)
        for photos in (benchmark.database, benchmark.queries):
            _open_sample(photos, config, problems)
    for line in problems.lines:
        print(without_secrets(line))
    return problems.lines


def _whole(config: BenchmarkConfig) -> Counts | None:
    """The published size of a benchmark, where it has one."""
    if isinstance(config, MslsConfig):
        is_whole = config.subtask is MslsSubtask.all and len(config.cities) == NUM_CITIES[config.split]
        if not is_whole or config.radius_m != RADIUS_M:
            return None
    return WHOLE.get(config.name)


def _check_counts(benchmark: Benchmark, whole: Counts | None, problems: Problems) -> None:
    stamp = benchmark.stamp()
    for what, number, expected in (
        ("queries", len(benchmark.queries), whole and whole.num_queries),
        ("database photos", len(benchmark.database), whole and whole.num_database),
    ):
        print(f"{benchmark.name}: {number:,} {what}" + (f" ({expected:,} expected)" if expected else ""))
        if expected and number != expected:
            problems.add(f"{benchmark.name}: {number:,} {what}; expected {expected:,}")
    if benchmark.positives is not None:
        dropped = stamp.get("num_queries_dropped")
        more = f" ({dropped:,} without were dropped)" if dropped is not None else ""
        print(f"{benchmark.name}: {stamp['num_queries_with_positives']:,} queries with positives{more}")


def _open_sample(photos: Manifest, config: CheckBenchmarkConfig, problems: Problems) -> None:
    """Decode some photos, drawn with a fixed seed, and say what is odd about those that a run would read."""
    num_opened = min(config.num_opened, len(photos))
    chosen = np.random.default_rng(0).choice(len(photos), num_opened, replace=False)
    remarks: list[str] = []
    for image_id in np.sort(chosen).tolist():
        url = photos.url(image_id)
        try:
            remark = images.load_pixels(url, SIDE_PX, max_megapixels=config.max_megapixels).remark
        except images.BrokenImageError as error:
            problems.add(f"{url}: {error}; expected a photo")
            continue
        if remark is not None:
            remarks.append(f"{url}: {remark}")
    if remarks:
        counted = f"{len(remarks):,} of {num_opened:,} opened photos are odd, but read"
        print(without_secrets(f"{counted}; the first: {remarks[0]}"))
