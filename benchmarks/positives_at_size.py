"""Positions and positives of a database as large as SF-XL's: seconds and peak memory of one process.

    python -m benchmarks.positives_at_size --report

Run it by hand from the root of the checkout; no photo is needed, it takes some minutes on two cores. Positions are
synthetic: panoramas along the streets of a square city, 12 views at the place of each, 5 m to the side at most. Every
case runs in a fresh process:

- names: the database's `@` names -> manifest, positions; the radius search of the queries; digests of the stamp
- table: a CSV file of latitude and longitude -> manifest, positions in one UTM zone; the same
- city, dense: the radius search alone, over a city of streets 100 m apart, and over a few streets

Seconds are of these steps, not of making the input. The peak is that of the whole process, input, torch and Ray
included, as in the driver of an evaluation; what it held before its work began stands beside it. The positives of
some queries are compared with every distance written out; a difference ends with status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import psutil
from numpy.typing import NDArray

from benchmarks import shared
from pairvpr.config.benchmark_schema import PositionColumns
from pairvpr.data.manifest import Benchmark, Manifest
from pairvpr.data.positions import PositionsTable, positions_from_names, positions_from_tables
from pairvpr.data.positives import within_radius
from pairvpr.data.problems import Problems
from pairvpr.distributed.progress import say

T = TypeVar("T")

WHAT = "positives_at_size"
VIEWS_PER_PANORAMA = 12
RADIUS_M = 25.0
SIDE_M, DENSE_SIDE_M, STREET_SPACING_M, MAX_ASIDE_M = 13_000.0, 2_000.0, 100.0, 5.0
ORIGIN_M = (545_000.0, 4_175_000.0)
NUM_COMPARED = 20
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """One process: what it does, and how many queries are asked."""

    name: str
    num_queries: int


@dataclass
class Measured:
    """Seconds of each step, and memory of the whole process."""

    seconds: dict[str, float]
    num_positives: int
    start_bytes: int
    peak_bytes: int = 0

    def timed(self, step: str, work: Callable[[], T]) -> T:
        """Do the work, and note its seconds under `step`."""
        start = time.perf_counter()
        done = work()
        self.seconds[step] = time.perf_counter() - start
        return done


def street_positions(num_places: int, side_m: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """(n, 2) east and north in metres of places along the streets of a square city."""
    along_m = rng.uniform(0, side_m, num_places)
    across_m = STREET_SPACING_M * rng.integers(0, int(side_m / STREET_SPACING_M) + 1, num_places)
    across_m = across_m + rng.uniform(-MAX_ASIDE_M, MAX_ASIDE_M, num_places)
    points = np.stack([along_m, across_m], axis=1)
    is_north = rng.random(num_places) < 0.5
    points[is_north] = points[is_north, ::-1]
    return np.round(points + ORIGIN_M, 2)


def database_positions(num_database: int, side_m: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """(n, 2): every panorama's place as often as it has views."""
    num_panoramas = -(-num_database // VIEWS_PER_PANORAMA)
    return street_positions(num_panoramas, side_m, rng).repeat(VIEWS_PER_PANORAMA, axis=0)[:num_database]


def at_names(utm_m: NDArray[np.float64]) -> list[str]:
    """Names of the length of SF-XL's, sorted as a folder is listed."""
    return sorted(
        f"{i % 999:03d}/@{east:010.2f}@{north:010.2f}@10@S@037.77493@-122.41942@{i:022d}@@{i % 360:03d}@@@@201406@@.jpg"
        for i, (east, north) in enumerate(utm_m.tolist())
    )


def write_table(path: Path, utm_m: NDArray[np.float64]) -> list[str]:
    """A CSV file of names and degrees (metres laid roughly on the sphere); returns the names."""
    degrees = (utm_m - ORIGIN_M) / 111_000 + (-122.5, 37.7)
    names = [f"photos/{i:09d}.jpg" for i in range(len(utm_m))]
    with path.open("w") as file:
        file.write("path,latitude,longitude\n")
        rows = zip(names, degrees.tolist(), strict=True)
        file.writelines(f"{name},{latitude:.8f},{longitude:.8f}\n" for name, (longitude, latitude) in rows)
    return names


def named_database(utm_m: NDArray[np.float64], measured: Measured) -> Manifest:
    """The database from `@` names."""
    names, problems = at_names(utm_m), Problems()
    listed = measured.timed("manifest", lambda: Manifest.of("database", names))
    database = measured.timed("positions", lambda: positions_from_names(listed, "database", problems))
    problems.raise_if_any()
    return database


def tabled_database(utm_m: NDArray[np.float64], measured: Measured) -> Manifest:
    """The database from a table of degrees."""
    problems = Problems()
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "database.csv"
        names = write_table(table, utm_m)
        listed = measured.timed("manifest", lambda: Manifest.of("database", names))
        tables = [PositionsTable("table", str(table), listed)]
        read = lambda: positions_from_tables(tables, PositionColumns(), "columns", problems)  # noqa: E731
        (database,) = measured.timed("positions", read)
    problems.raise_if_any()
    return database


def compare(queries: NDArray[np.float64], database: NDArray[np.float64], found: list[NDArray[np.int64]]) -> None:
    """Some queries against every distance written out; ends with status 1 where they differ."""
    for i in np.linspace(0, len(queries) - 1, NUM_COMPARED).astype(int):
        squares_m2 = ((database - queries[i]) ** 2).sum(axis=1)
        if found[i].tolist() != np.flatnonzero(squares_m2 <= RADIUS_M**2).tolist():
            sys.exit(f"query {i}: {len(found[i])} positives found, expected {(squares_m2 <= RADIUS_M**2).sum()}")


def run_case(case: Case, num_database: int) -> Measured:
    """The work of the fresh process."""
    measured = Measured({}, 0, psutil.Process().memory_info().rss)
    rng = np.random.default_rng(0)
    side_m = DENSE_SIDE_M if case.name == "dense" else SIDE_M
    queries_utm_m = street_positions(case.num_queries, side_m, rng)
    database_utm_m = database_positions(num_database, side_m, rng)
    database = None
    if case.name in DATABASES:
        database = DATABASES[case.name](database_utm_m, measured)
        database_utm_m = database.utm_m
        queries_utm_m = database_utm_m[rng.choice(num_database, case.num_queries, replace=False)] + 3.0
    found = measured.timed("search", lambda: within_radius(queries_utm_m, database_utm_m, RADIUS_M))
    if database is not None:
        queries = Manifest.of("queries", [f"{i}.jpg" for i in range(case.num_queries)], queries_utm_m)
        benchmark = Benchmark(name=case.name, database=database, queries=queries, positives=found, protocol={})
        measured.timed("stamp", benchmark.stamp)
    measured.num_positives = sum(map(len, found))
    measured.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    compare(queries_utm_m, database_utm_m, found)
    return measured


def measure(case: Case, num_database: int) -> Measured:
    """`run_case` in a fresh process."""
    command = [sys.executable, "-m", f"benchmarks.{WHAT}", "--child", case.name, str(case.num_queries)]
    command += ["--database", str(num_database)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return Measured(**json.loads(done.stdout))


def report(measured: dict[Case, Measured], num_database: int, load_at_start: float) -> str:
    """All tables as Markdown."""
    steps = ("manifest", "positions", "search", "stamp")
    rows = [
        [case.name, f"{case.num_queries:,}", f"{one.num_positives / case.num_queries:,.0f}"]
        + [f"{one.seconds[step]:.1f}" if step in one.seconds else "" for step in steps]
        + [f"{sum(one.seconds.values()):.1f}", f"{one.start_bytes / MIB:,.0f}", f"{one.peak_bytes / MIB:,.0f}"]
        for case, one in measured.items()
    ]
    header = ("case", "queries", "positives of a query", *(f"{step} (s)" for step in steps))
    return f"""# Positions and positives of {num_database:,} database photos

One process for each case; the positives of {NUM_COMPARED} queries of each equal brute force.

{shared.markdown_table((*header, "together (s)", "MiB before", "MiB at the peak"), rows)}

- names: `@` names of {len(at_names(np.zeros((1, 2)))[0])} characters; table: a CSV file of latitude and longitude
- city: streets {STREET_SPACING_M:.0f} m apart over {SIDE_M / 1000:.0f} x {SIDE_M / 1000:.0f} km; dense: as many photos
  over {DENSE_SIDE_M / 1000:.0f} x {DENSE_SIDE_M / 1000:.0f} km
- stamp: digests of paths and positives

{shared.circumstances(WHAT, load_at_start)}"""


DATABASES = {"names": named_database, "table": tabled_database}


def main() -> None:
    """Every case in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", type=int, default=2_805_840, help="database photos (2,805,840)")
    parser.add_argument("--queries", type=int, default=1000, help="queries (1,000)")
    parser.add_argument("--many", type=int, default=50_000, help="queries of the dense case (50,000)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    shared.add_report_option(parser, WHAT)
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(asdict(run_case(Case(options.child[0], int(options.child[1])), options.database))))
        return
    load_at_start = os.getloadavg()[0]
    measured: dict[Case, Measured] = {}
    for name, num_queries in (
        ("names", options.queries),
        ("table", options.queries),
        ("city", options.queries),
        ("dense", options.many),
    ):
        case = Case(name, num_queries)
        measured[case] = measure(case, options.database)
        say(f"{name}: {measured[case]}")
    shared.publish(WHAT, report(measured, options.database, load_at_start), options.report)


if __name__ == "__main__":
    main()
