"""Layout `folders`: two folders of photos; positives from a table of pairs, from positions and a radius, or none."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pairvpr.config.benchmark_schema import FoldersConfig, PositionSource
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
from pairvpr.data.spellings import no_photo_text
from pairvpr.data.tables import Rows, TableFile, find_photos


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


def positives_from_table(
    url: str, queries: Manifest, database: Manifest, problems: Problems
) -> list[NDArray[np.int64]]:
    """Ids of the positives of each query, ascending, from the columns `query`, `database` (relative paths).

    A row that names an unknown photo is a problem. Raises `UserError`, naming the file, for a missing column.
    """
    rows = TableFile.open(url, "benchmark.positives").read(["query", "database"], problems)
    if not len(rows):
        problems.add(f"{url}: no row that can be used; expected one for each pair")
    query_ids, database_ids = _ids(rows, "query", queries, problems), _ids(rows, "database", database, problems)
    is_known = (query_ids >= 0) & (database_ids >= 0)
    pairs = np.unique(np.stack([query_ids, database_ids], axis=1)[is_known], axis=0)
    return np.split(pairs[:, 1], np.searchsorted(pairs[:, 0], np.arange(1, len(queries))))


def _ids(rows: Rows, name: str, photos: Manifest, problems: Problems) -> NDArray[np.int64]:
    paths = rows.texts(name)
    image_ids = find_photos(paths, photos)
    for i in np.flatnonzero(image_ids < 0).tolist():
        why = no_photo_text(paths[i].as_py() or "", image_ids[i], photos.root, f"{name} photo")
        problems.add(f"{rows.where(i)}: {why}")
    return image_ids
