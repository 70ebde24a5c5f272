"""The settings of each benchmark layout. The benchmarks themselves are `configs/benchmark/`."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from pairvpr.config.checks import require, require_positive, require_text


@dataclass(kw_only=True, slots=True)
class BenchmarkJobConfig:
    """Settings of all jobs that use a benchmark."""

    datasets_root: str | None = None
    """Folder (path or URL) of the downloaded datasets; used by all benchmarks except folders and toy_city."""

    def __post_init__(self) -> None:
        require_text(self, "", "datasets_root")


@dataclass(kw_only=True, slots=True)
class BenchmarkConfig:
    """Settings of every benchmark layout."""

    name: str = "???"
    """Name of the benchmark in reports; with several benchmarks also its output folder."""

    def __post_init__(self) -> None:
        require_text(self, "benchmark.", "name")
        require(
            "/" not in self.name and not self.name.startswith("."),
            f"benchmark.name={self.name}: expected a plain name without '/' and without a leading '.'",
        )


class PositionSource(StrEnum):
    """The source of photo positions."""

    names = "names"
    table = "table"
    exif = "exif"


@dataclass(kw_only=True, slots=True)
class PositionColumns:
    """The column names of a table of positions."""

    path: str = "path"
    """Paths of photos, relative to their folder."""
    utm_east: str = "utm_east"
    """UTM coordinate in metres; all photos in one zone."""
    utm_north: str = "utm_north"
    """UTM coordinate in metres; all photos in one zone."""
    latitude: str = "latitude"
    """WGS84 degrees; used if the table has no UTM columns."""
    longitude: str = "longitude"
    """WGS84 degrees; used if the table has no UTM columns."""
    heading: str = "heading"
    """Degrees clockwise from north; the column is optional, and its cells may be empty."""

    def __post_init__(self) -> None:
        names = ("path", "utm_east", "utm_north", "latitude", "longitude", "heading")
        require_text(self, "benchmark.columns.", *names)
        values = [getattr(self, name) for name in names]
        twice = [value for value in values if values.count(value) > 1]
        require(
            not twice, f"benchmark.columns: {''.join(twice[:1])} names two columns; expected a different name for each"
        )


@dataclass(kw_only=True, slots=True)
class PhotosConfig(BenchmarkConfig):
    """Settings of every layout of real photos: their matches and positions may come from files of their own."""

    positives: str | None = None
    """CSV or Parquet with columns query,database (relative paths; MSLS also keys): a row per pair of the same place."""
    database_table: str | None = None
    """CSV or Parquet (path or URL) with the positions of database photos; in folders, also the list of them."""
    queries_table: str | None = None
    """The same for query photos; in folders it is optional without a radius."""
    columns: PositionColumns = field(default_factory=PositionColumns)

    def __post_init__(self) -> None:
        BenchmarkConfig.__post_init__(self)
        require_text(self, "benchmark.", "positives", "database_table", "queries_table")


@dataclass(kw_only=True, slots=True)
class DownloadConfig(PhotosConfig):
    """Settings of every layout of a public download, which has positions or matches of its own."""

    def __post_init__(self) -> None:
        PhotosConfig.__post_init__(self)
        tables = ("database_table", "queries_table")
        given = [key for key in tables if getattr(self, key) is not None]
        require(
            len(given) != 1,
            f"benchmark.{''.join(given[:1])} is set alone: expected benchmark.database_table and "
            "benchmark.queries_table together",
        )


@dataclass(kw_only=True, slots=True)
class FoldersConfig(PhotosConfig):
    """Two folders of photos. Positives come from a table, from positions and a radius, or there are none."""

    database: str = "???"
    """Folder of database photos (path or URL), searched recursively."""
    queries: str = "???"
    """Folder of query photos (path or URL), searched recursively."""
    radius_m: float | None = None
    """Photos at most this far apart show the same place; needs positions."""
    positions: PositionSource = PositionSource.names
    """Source of positions: names (`@utm_east@utm_north@...`, read only with a radius), table, or exif (GPS tags)."""

    def __post_init__(self) -> None:
        PhotosConfig.__post_init__(self)
        require_text(self, "benchmark.", "database", "queries")
        require_positive(self, "benchmark", "radius_m")
        require(
            self.positives is None or self.radius_m is None,
            "benchmark.positives and benchmark.radius_m are both set: expected one source of positives "
            "(benchmark.radius_m=null leaves the list alone)",
        )
        for key, is_needed in (("database_table", True), ("queries_table", self.radius_m is not None)):
            has_table, reads_tables = getattr(self, key) is not None, self.positions is PositionSource.table
            require(reads_tables or not has_table, f"benchmark.{key} is set: expected also benchmark.positions=table")
            require(
                has_table or not (reads_tables and is_needed),
                f"benchmark.positions=table: expected also benchmark.{key}=FILE, a CSV or Parquet file",
            )


@dataclass(kw_only=True, slots=True)
class ToyCityConfig(BenchmarkConfig):
    """A small synthetic city, generated from a seed: no download."""

    seed: int = 0
    """Seed of the city."""
    num_places: int = 60
    """Number of places along the city's streets."""
    photos_per_place: int = 3
    """Database photos per place."""
    queries_per_place: int = 1
    """Query photos per place, taken on another day."""
    radius_m: float = 25.0
    """Photos at most this far apart show the same place."""

    def __post_init__(self) -> None:
        BenchmarkConfig.__post_init__(self)
        require_positive(self, "benchmark", "num_places", "photos_per_place", "queries_per_place", "radius_m")
        require(self.seed >= 0, f"benchmark.seed={self.seed}: expected 0 or more")


class MslsSplit(StrEnum):
    """The two halves of the download of Mapillary Street-Level Sequences."""

    train_val = "train_val"
    test = "test"


class MslsSubtask(StrEnum):
    """Columns of subtask_index.csv: summer/winter, old/new, day/night, and all."""

    all = "all"
    s2w = "s2w"
    w2s = "w2s"
    o2n = "o2n"
    n2o = "n2o"
    d2n = "d2n"
    n2d = "n2d"


@dataclass(kw_only=True, slots=True)
class MslsConfig(DownloadConfig):
    """Mapillary Street-Level Sequences from its CSV files: several cities in one index."""

    root: str = "???"
    """Folder (path or URL) that contains train_val/ and test/."""
    split: MslsSplit = MslsSplit.train_val
    """train_val or test; the ground truth of test is that of its tables, where they hold positions."""
    cities: list[str] = field(default_factory=list)
    """City folders of the split; their order determines photo ids."""
    subtask: MslsSubtask = MslsSubtask.all
    """Rows of the CSV files to use: all, s2w, w2s, o2n, n2o, d2n or n2d."""
    radius_m: float = 25.0
    """Photos of one city at most this far apart show the same place."""

    def __post_init__(self) -> None:
        DownloadConfig.__post_init__(self)
        require_text(self, "benchmark.", "root")
        require_positive(self, "benchmark", "radius_m")
        cities = f"benchmark.cities=[{','.join(self.cities)}]"
        require(len(self.cities) > 0, f"{cities}: expected one or more cities, such as [cph,sf]")
        require(len(set(self.cities)) == len(self.cities), f"{cities}: the same city is given twice")
        require(
            all(city and "/" not in city and not city.startswith(".") for city in self.cities),
            f"{cities}: expected plain folder names, such as [cph,sf]",
        )


@dataclass(kw_only=True, slots=True)
class NordlandConfig(DownloadConfig):
    """Nordland: frames of one railway journey in two seasons, numbered from 0."""

    database: str = "???"
    """Folder (path or URL) of the reference frames."""
    queries: str = "???"
    """Folder (path or URL) of the query frames."""
    frames_per_query: int = 1
    """Query i corresponds to reference frame i * frames_per_query."""
    tolerance_frames: int = 1
    """Reference frames at most this far from the query's frame show the same place."""

    def __post_init__(self) -> None:
        DownloadConfig.__post_init__(self)
        require_text(self, "benchmark.", "database", "queries")
        require_positive(self, "benchmark", "frames_per_query")
        require(self.tolerance_frames >= 0, f"benchmark.tolerance_frames={self.tolerance_frames}: expected 0 or more")


@dataclass(kw_only=True, slots=True)
class PittsburghConfig(DownloadConfig):
    """Pittsburgh: photos and positions listed in a MATLAB file."""

    root: str = "???"
    """Folder (path or URL) of the database photos (000/, 001/, ...) and of queries_real/."""
    db_struct: str = "???"
    """MATLAB file (path or URL) with dbStruct: names and UTM positions of database and queries."""
    radius_m: float = 25.0
    """Photos at most this far apart show the same place."""

    def __post_init__(self) -> None:
        DownloadConfig.__post_init__(self)
        require_text(self, "benchmark.", "root", "db_struct")
        require_positive(self, "benchmark", "radius_m")
