"""Matches and positions that a user's files state for the photos of a benchmark, whatever its layout."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pairvpr.config.benchmark_schema import DownloadConfig
from pairvpr.data.manifest import Manifest
from pairvpr.data.positions import PositionsTable, positions_from_tables
from pairvpr.data.problems import Problems
from pairvpr.data.spellings import no_photo_text
from pairvpr.data.tables import Rows, TableFile, find_photos


def positives_from_table(
    url: str, queries: Manifest, database: Manifest, problems: Problems, *, have_keys: bool = False
) -> list[NDArray[np.int64]]:
    """Ids of the positives of each query, ascending, from the columns `query`, `database` (relative paths).

    Names may be keys if photos `have_keys`. A row that names an unknown photo is a problem. Raises `UserError`, naming
    the file, for a missing column.
    """
    rows = TableFile.open(url, "benchmark.positives").read(["query", "database"], problems)
    if not len(rows):
        problems.add(f"{url}: no row that can be used; expected one for each pair")
    query_ids = _ids(rows, "query", queries, problems, have_keys)
    database_ids = _ids(rows, "database", database, problems, have_keys)
    is_known = (query_ids >= 0) & (database_ids >= 0)
    pairs = np.unique(np.stack([query_ids, database_ids], axis=1)[is_known], axis=0)
    return np.split(pairs[:, 1], np.searchsorted(pairs[:, 0], np.arange(1, len(queries))))


def _ids(rows: Rows, name: str, photos: Manifest, problems: Problems, have_keys: bool) -> NDArray[np.int64]:
    paths = rows.texts(name)
    image_ids = find_photos(paths, photos, have_keys=have_keys)
    for i in np.flatnonzero(image_ids < 0).tolist():
        why = no_photo_text(paths[i].as_py() or "", image_ids[i], photos.root, f"{name} photo")
        problems.add(f"{rows.where(i)}: {why}")
    return image_ids


def with_tables(
    config: DownloadConfig, database: Manifest, queries: Manifest, problems: Problems, *, have_keys: bool = False
) -> tuple[Manifest, Manifest]:
    """The same photos, with the positions of benchmark.database_table and benchmark.queries_table where these are set.

    Raises `UserError` unless the tables have a usable row for every photo.
    """
    if config.database_table is None or config.queries_table is None:
        return database, queries
    sources = [
        PositionsTable("benchmark.database_table", config.database_table, database, have_keys),
        PositionsTable("benchmark.queries_table", config.queries_table, queries, have_keys),
    ]
    placed = positions_from_tables(sources, config.columns, "benchmark.columns", problems)
    for source, found in zip(sources, placed, strict=True):
        missing = np.flatnonzero(found.ids_of(source.photos.path_column) < 0)
        if len(missing):
            problems.add(
                f"{source.url}: no position of {source.photos.path(int(missing[0]))} and {len(missing) - 1:,} others; "
                "expected a row for each photo that takes part"
            )
    problems.raise_if_any()
    return placed[0], placed[1]
