"""One small module per layout: configuration -> `Benchmark`."""

from __future__ import annotations

from pairvpr.config.benchmark_schema import BenchmarkConfig, FoldersConfig, ToyCityConfig
from pairvpr.data.benchmarks import folders, toy_city
from pairvpr.data.manifest import Benchmark


def load_benchmark(config: BenchmarkConfig, output: str) -> Benchmark:
    """The benchmark that `config` describes; nothing is written.

    `output` is the run's directory, below which a drawn benchmark puts its photos. Raises `UserError` for
    missing folders, names without coordinates, and ground truth that names no photo.
    """
    match config:
        case FoldersConfig():
            return folders.load(config)
        case ToyCityConfig():
            return toy_city.load(config, output)
        case _:
            raise AssertionError(f"no loader for {type(config).__name__}")


def prepare_benchmark(config: BenchmarkConfig, output: str) -> None:
    """Make the photos of a drawn benchmark; finished ones are kept. Downloaded benchmarks need nothing."""
    if isinstance(config, ToyCityConfig):
        toy_city.draw_photos(config, output)
