"""One small module per layout: configuration -> `Benchmark`."""

from __future__ import annotations

import pyarrow as pa

from pairvpr.config.benchmark_schema import (
    BenchmarkConfig,
    FoldersConfig,
    MslsConfig,
    NordlandConfig,
    PittsburghConfig,
    ToyCityConfig,
)
from pairvpr.data.benchmarks import folders, msls, nordland, pittsburgh, toy_city
from pairvpr.data.manifest import Benchmark
from pairvpr.data.problems import Problems
from pairvpr.data.same_photos import same_photos
from pairvpr.terminal import say


def load_benchmark(config: BenchmarkConfig, output: str) -> Benchmark:
    """The benchmark that `config` describes; nothing is written.

    `output` is the run's directory, where a generated benchmark puts its photos. Raises `UserError` for the first
    problem with the photos, their positions or the ground truth.
    """
    problems = Problems()
    benchmark = read_benchmark(config, output, problems)
    problems.raise_if_any()
    return benchmark


def read_benchmark(config: BenchmarkConfig, output: str, problems: Problems) -> Benchmark:
    """Like `load_benchmark`, but problems are added to `problems`, and the benchmark is made from the rest.

    Raises `UserError` if nothing usable is left.
    """
    benchmark = _read(config, output, problems)
    _check_apart(benchmark, problems)
    _say_same_photos(benchmark)
    return benchmark


def _say_same_photos(benchmark: Benchmark) -> None:
    queries, database = benchmark.queries, benchmark.database
    if pairs := same_photos(queries, database):
        query_id, image_id = pairs[0]
        say(
            f"{benchmark.name}: {len(pairs):,} of {len(queries):,} queries are database photos, too, and each finds "
            f"itself; the first: {queries.url(query_id)} holds the bytes of {database.url(image_id)}"
        )


def _check_apart(benchmark: Benchmark, problems: Problems) -> None:
    """Add a problem for photos that are both query and database: they would make recall meaningless."""
    if benchmark.positives is None:
        return
    database, queries = benchmark.database, benchmark.queries
    urls = [queries.url(query_id) for query_id in range(len(queries))]
    below = [url.removeprefix(f"{database.root}/") for url in urls if url.startswith(f"{database.root}/")]
    ids = database.ids_of(pa.chunked_array([below], pa.string()))
    twice = [path for path, image_id in zip(below, ids, strict=True) if image_id >= 0]
    if twice:
        problems.add(
            f"{benchmark.name}: {twice[0]} and {len(twice) - 1:,} others are queries and database photos at once; "
            "expected each photo on one side"
        )


def _read(config: BenchmarkConfig, output: str, problems: Problems) -> Benchmark:
    match config:
        case FoldersConfig():
            return folders.load(config, problems)
        case MslsConfig():
            return msls.load(config, problems)
        case NordlandConfig():
            return nordland.load(config, problems)
        case PittsburghConfig():
            return pittsburgh.load(config, problems)
        case ToyCityConfig():
            return toy_city.load(config, output)
        case _:
            raise AssertionError(f"no loader for {type(config).__name__}")


def prepare_benchmark(config: BenchmarkConfig, output: str) -> None:
    """Generate the photos of a toy benchmark, keeping finished ones. Downloaded benchmarks need nothing."""
    if isinstance(config, ToyCityConfig):
        toy_city.draw_photos(config, output)
