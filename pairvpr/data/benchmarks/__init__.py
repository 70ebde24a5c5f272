"""One small module per layout: configuration -> `Benchmark`."""

from __future__ import annotations

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


def load_benchmark(config: BenchmarkConfig, output: str) -> Benchmark:
    """The benchmark that `config` describes; nothing is written.

    `output` is the run's directory, below which a drawn benchmark puts its photos. Raises `UserError` for the first
    thing that is wrong with the photos, their positions or the ground truth.
    """
    problems = Problems()
    benchmark = read_benchmark(config, output, problems)
    problems.raise_if_any()
    return benchmark


def read_benchmark(config: BenchmarkConfig, output: str, problems: Problems) -> Benchmark:
    """As `load_benchmark`, but what is wrong is added to `problems`, and the benchmark is made of the rest.

    Raises `UserError` where nothing can be made of it.
    """
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
    """Make the photos of a drawn benchmark; finished ones are kept. Downloaded benchmarks need nothing."""
    if isinstance(config, ToyCityConfig):
        toy_city.draw_photos(config, output)
