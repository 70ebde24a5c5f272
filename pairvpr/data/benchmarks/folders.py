"""Layout `folders`: two folders of photos; positives from a CSV, from names and a radius, or none."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pairvpr.config.benchmark_schema import FoldersConfig
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

    Raises `UserError`, naming file and row (its line; the header is row 1), for a missing column or an unknown photo.
    """
    query_ids = {path: image_id for image_id, path in enumerate(queries.paths)}
    database_ids = {path: image_id for image_id, path in enumerate(database.paths)}
    found: list[set[int]] = [set() for _ in range(len(queries))]
    for row, query, match in _read_csv(url):
        if query not in query_ids:
            raise UserError(f"{url}, row {row}: no query photo {query!r} in {queries.root}")
        if match not in database_ids:
            raise UserError(f"{url}, row {row}: no database photo {match!r} in {database.root}")
        found[query_ids[query]].add(database_ids[match])
    return [np.array(sorted(ids), dtype=np.int64) for ids in found]


def _read_csv(url: str) -> Iterator[tuple[int, str, str]]:
    """Line number, query and database of every row that is not blank."""
    try:
        text = storage.read_bytes(url).decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(f"benchmark.positives={url}: no such file") from error
    except OSError as error:
        raise UserError(f"benchmark.positives={url}: can't be read: {storage.reason(error)}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{url}: not a CSV file: not UTF-8 text") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(filter(None, reader), [])
        _check_header(url, header)
        query_column, database_column = header.index("query"), header.index("database")
        for cells in filter(None, reader):
            if len(cells) != len(header):
                raise UserError(
                    f"{url}: not a CSV file: row {reader.line_num} has {len(cells)} cells, expected {len(header)}"
                )
            yield reader.line_num, cells[query_column], cells[database_column]
    except csv.Error as error:
        raise UserError(f"{url}: not a CSV file: row {reader.line_num}: {error}") from error


def _check_header(url: str, header: list[str]) -> None:
    if not header:
        raise UserError(f"{url}: not a CSV file: empty; expected the columns query,database")
    missing = [name for name in ("database", "query") if name not in header]
    if missing:
        raise UserError(f"{url}: no column {', '.join(missing)}; expected query,database")
    twice = [name for name in ("database", "query") if header.count(name) > 1]
    if twice:
        raise UserError(f"{url}: more than one column {', '.join(twice)}; expected query,database once each")
