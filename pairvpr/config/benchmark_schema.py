"""The settings of each benchmark layout. The benchmarks themselves are `configs/benchmark/`."""

from __future__ import annotations

from dataclasses import dataclass

from pairvpr.config.checks import require, require_positive, require_text


@dataclass(kw_only=True, slots=True)
class BenchmarkConfig:
    """What every benchmark layout has."""

    name: str = "???"
    """What reports call the benchmark; with several benchmarks also the name of its output folder."""

    def __post_init__(self) -> None:
        require_text(self, "benchmark.", "name")
        require(
            "/" not in self.name and not self.name.startswith("."),
            f"benchmark.name={self.name}: expected a plain name, without '/' and no '.' in front",
        )


@dataclass(kw_only=True, slots=True)
class FoldersConfig(BenchmarkConfig):
    """Two folders of photos. Positives from a CSV, from `@utm_east@utm_north@` names and a radius, or none."""

    database: str = "???"
    """Folder of database photos (path or URL), searched recursively."""
    queries: str = "???"
    """Folder of query photos (path or URL), searched recursively."""
    positives: str | None = None
    """CSV with the columns query,database (paths relative to the two folders): who shows the same place."""
    radius_m: float | None = None
    """Photos at most this far apart show the same place; needs names with coordinates."""

    def __post_init__(self) -> None:
        BenchmarkConfig.__post_init__(self)
        require_text(self, "benchmark.", "database", "queries", "positives")
        require_positive(self, "benchmark", "radius_m")
        require(
            self.positives is None or self.radius_m is None,
            "benchmark.positives and benchmark.radius_m are both set: expected one source of positives",
        )


@dataclass(kw_only=True, slots=True)
class ToyCityConfig(BenchmarkConfig):
    """A small city drawn by code: no download, deterministic by seed."""

    seed: int = 0
    """Another seed is another city."""
    num_places: int = 60
    """Places along the streets of the city."""
    photos_per_place: int = 3
    """Database photos of each place."""
    queries_per_place: int = 1
    """Query photos of each place, taken on another day."""
    radius_m: float = 25.0
    """Photos at most this far apart show the same place."""

    def __post_init__(self) -> None:
        BenchmarkConfig.__post_init__(self)
        require_positive(self, "benchmark", "num_places", "photos_per_place", "queries_per_place", "radius_m")
        require(self.seed >= 0, f"benchmark.seed={self.seed}: expected 0 or more")
