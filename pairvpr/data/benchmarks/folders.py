"""Layout `folders`: two folders of photos; positives from a table of pairs, from positions and a radius, or none."""

from __future__ import annotations

from pairvpr.config.benchmark_schema import FoldersConfig, PositionSource
from pairvpr.data.benchmarks.truth import positives_from_table
from pairvpr.data.manifest import Benchmark, Manifest, folder_manifest
from pairvpr.data.positions import (
    PositionsTable,
    positions_from_exif,
    positions_from_names,
    positions_from_tables,
    zone_of_names,
)
from pairvpr.data.positives import within_radius
from pairvpr.data.problems import Problems


def load(config: FoldersConfig, problems: Problems) -> Benchmark:
    """Photos sorted by path relative to their folder: the whole folder, or those in its table of positions.

    Unusable photos and rows are problems and left out. Raises `UserError` if a folder or table can't be read.
    """
    found: dict[str, Manifest] = {}
    for part, folder in (("database", config.database), ("queries", config.queries)):
        with problems.gathered():
            found[part] = folder_manifest(folder, f"benchmark.{part}")
    if len(found) < 2:
        problems.raise_if_any()
    database, queries = _with_positions(config, found["database"], found["queries"], problems)
    positives, rule = None, "none"
    if config.positives is not None:
        rule = "list"
        with problems.gathered():
            positives = positives_from_table(config.positives, queries, database, problems)
    elif config.radius_m is not None:
        positives, rule = within_radius(queries.utm_m, database.utm_m, config.radius_m), "radius"
    return Benchmark(
        name=config.name,
        database=database,
        queries=queries,
        positives=positives,
        protocol={"positives": rule, "radius_m": config.radius_m},
    )


def _with_positions(
    config: FoldersConfig, database: Manifest, queries: Manifest, problems: Problems
) -> tuple[Manifest, Manifest]:
    match config.positions:
        case PositionSource.table:
            tables = [PositionsTable("benchmark.database_table", str(config.database_table), database)]
            if config.queries_table is not None:
                tables.append(PositionsTable("benchmark.queries_table", config.queries_table, queries))
            placed = positions_from_tables(tables, config.columns, "benchmark.columns", problems)
            return placed[0], placed[1] if len(placed) > 1 else queries
        case PositionSource.exif:
            if config.radius_m is None:
                return positions_from_exif([database], problems)[0], queries
            with_database, with_queries = positions_from_exif([database, queries], problems)
            return with_database, with_queries
        case PositionSource.names:
            if config.radius_m is None:
                return database, queries
            return (
                positions_from_names(database, "benchmark.database", problems),
                positions_from_names(queries, "benchmark.queries", problems, zone_of_names(database)),
            )
