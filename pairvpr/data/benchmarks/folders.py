"""Layout `folders`: two folders of photos; positives from a CSV, from names and a radius, or none."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import csv

from pairvpr.config.schema import FoldersConfig
from pairvpr.data import storage
from pairvpr.data.manifest import Benchmark, Manifest, folder_manifest, positions_from_names
from pairvpr.data.positives import within_radius
from pairvpr.errors import UserError


def load(config: FoldersConfig) -> Benchmark:
    """Photos sorted by path relative to their folder. Raises `UserError` as `load_benchmark` says."""
    database = folder_manifest(config.database, "benchmark.database")
    queries = folder_manifest(config.queries, "benchmark.queries")
    if config.radius_m is not None:
        database_utm_m = positions_from_names(database, "benchmark.database")
        queries_utm_m = positions_from_names(queries, "benchmark.queries")
        return Benchmark(
            name=config.name,
            database=Manifest.of(database.root, database.paths, database_utm_m),
            queries=Manifest.of(queries.root, queries.paths, queries_utm_m),
            positives=within_radius(queries_utm_m, database_utm_m, config.radius_m),
            protocol={"positives": "radius", "radius_m": config.radius_m},
        )
    positives = None
    if config.positives is not None:
        positives = positives_from_csv(config.positives, queries, database)
    return Benchmark(
        name=config.name,
        database=database,
        queries=queries,
        positives=positives,
        protocol={"positives": "none" if positives is None else "list", "radius_m": None},
    )


def positives_from_csv(url: str, queries: Manifest, database: Manifest) -> list[NDArray[np.int64]]:
    """Ids of the positives of each query, ascending, from the columns `query`, `database` (relative paths).

    Raises `UserError`, naming file and row (the header is row 1), for a missing column or an unknown photo.
    """
    table = _read_csv(url)
    query_ids = {path: image_id for image_id, path in enumerate(queries.paths)}
    database_ids = {path: image_id for image_id, path in enumerate(database.paths)}
    found: list[set[int]] = [set() for _ in range(len(queries))]
    pairs = zip(table.column("query").to_pylist(), table.column("database").to_pylist(), strict=True)
    for row, (query, match) in enumerate(pairs, start=2):
        if query not in query_ids:
            raise UserError(f"{url}, row {row}: no query photo {query!r} in {queries.root}")
        if match not in database_ids:
            raise UserError(f"{url}, row {row}: no database photo {match!r} in {database.root}")
        found[query_ids[query]].add(database_ids[match])
    return [np.array(sorted(ids), dtype=np.int64) for ids in found]


def _read_csv(url: str) -> pa.Table:
    try:
        data = storage.read_bytes(url)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"benchmark.positives={url}: no such file") from error
    as_text = csv.ConvertOptions(column_types={"query": pa.string(), "database": pa.string()})
    try:
        table = csv.read_csv(io.BytesIO(data), convert_options=as_text)
    except pa.ArrowInvalid as error:
        raise UserError(f"{url}: not a CSV file: {str(error).splitlines()[0]}") from error
    missing = {"query", "database"} - set(table.column_names)
    if missing:
        raise UserError(f"{url}: no column {', '.join(sorted(missing))}; expected query,database")
    return table
