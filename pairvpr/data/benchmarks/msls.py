"""Mapillary Street-Level Sequences, read from the CSV files of its download.

Each `<split>/<city>/{query,database}/` holds `images/<key>.jpg` and tables whose rows are matched by row number:
seq_info.csv (key), subtask_index.csv (a column per subtask) and, only for train_val, postprocessed.csv (key, easting,
northing) and raw.csv (key, pano). Other columns are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pairvpr.config.benchmark_schema import MslsConfig, MslsSplit
from pairvpr.data import storage
from pairvpr.data.benchmarks.listed import listed_paths
from pairvpr.data.manifest import Benchmark, Manifest
from pairvpr.data.positives import within_radius
from pairvpr.data.problems import Problems
from pairvpr.data.tables import Rows, TableFile
from pairvpr.errors import UserError

_FLAGS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True, eq=False)
class _Photos:
    """Paths below the split's folder, in row order, and (n, 2) UTM east, north; NaN where unknown."""

    paths: list[str]
    utm_m: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.paths)

    def only(self, kept: NDArray[np.bool_]) -> _Photos:
        return _Photos([path for path, is_kept in zip(self.paths, kept, strict=True) if is_kept], self.utm_m[kept])


def load(config: MslsConfig, problems: Problems) -> Benchmark:
    """The cities in sequence, with rows in table order.

    train_val: without panoramas; positives within a radius and the city, since cities lie in different UTM zones;
    queries without a positive are dropped. test: all rows of the subtask, no ground truth.
    """
    root = storage.join(storage.absolute(config.root), config.split)
    if not _is_there(root):
        raise UserError(f"benchmark.root={config.root}: it has no folder {config.split}/; expected the MSLS download")
    database, queries = (
        {city: _read_photos(root, city, part, config, problems) for city in config.cities}
        for part in ("database", "query")
    )
    num_listed = sum(map(len, queries.values()))
    positives = None
    if config.split is MslsSplit.train_val:
        positives, has_positive = _positives(queries, database, config.radius_m)
        queries = {city: photos.only(has_positive[city]) for city, photos in queries.items()}
    for what, photos in (("database", database), ("query", queries)):
        if not sum(map(len, photos.values())):
            problems.raise_if_any()
            with_positive = " with a positive" if what == "query" and num_listed else ""
            raise UserError(
                f"{root}: no {what} photo{with_positive} of benchmark.subtask={config.subtask} in "
                f"{', '.join(config.cities)}; expected another subtask or more cities"
            )
    return Benchmark(
        name=config.name,
        database=_manifest(root, database),
        queries=_manifest(root, queries),
        positives=positives,
        protocol=_protocol(config, num_listed - sum(map(len, queries.values()))),
        query_groups=[city for city, photos in queries.items() for _ in photos.paths],
        has_submission=config.split is MslsSplit.test,
    )


def _protocol(config: MslsConfig, num_dropped: int) -> dict[str, object]:
    which: dict[str, object] = {"subtask": str(config.subtask), "cities": list(config.cities)}
    if config.split is MslsSplit.test:
        return {"positives": "none", "radius_m": None, **which}
    return {
        "positives": "radius, within the city",
        "radius_m": config.radius_m,
        **which,
        "queries_without_positives": "dropped",
        "num_queries_dropped": num_dropped,
    }


def _positives(
    queries: dict[str, _Photos], database: dict[str, _Photos], radius_m: float
) -> tuple[list[NDArray[np.int64]], dict[str, NDArray[np.bool_]]]:
    """Positives of the queries that have some, and for each city (n,) which queries these are."""
    positives: list[NDArray[np.int64]] = []
    has_positive: dict[str, NDArray[np.bool_]] = {}
    first_id = 0
    for city, photos in queries.items():
        found = within_radius(photos.utm_m, database[city].utm_m, radius_m)
        has_positive[city] = np.array([len(ids) > 0 for ids in found], bool)
        positives += [ids + first_id for ids in found if len(ids)]
        first_id += len(database[city])
    return positives, has_positive


def _manifest(root: str, photos: dict[str, _Photos]) -> Manifest:
    paths = [path for city in photos.values() for path in city.paths]
    return Manifest.of(root, paths, np.concatenate([city.utm_m for city in photos.values()]))


def _read_photos(root: str, city: str, part: str, config: MslsConfig, problems: Problems) -> _Photos:
    """The photos of a city's database or queries that take part; none if a table is unusable."""
    folder = storage.join(root, city, part)
    if not _is_there(folder):
        problems.add(f"{folder}: no such folder; expected images/ and CSV files for a city of benchmark.cities")
        return _Photos([], np.empty((0, 2)))
    columns = {"seq_info.csv": ["key"], "subtask_index.csv": [str(config.subtask)]}
    if config.split is MslsSplit.train_val:
        columns |= {"postprocessed.csv": ["key", "easting", "northing"], "raw.csv": ["key", "pano"]}
    tables = _read_tables(folder, columns, problems)
    if len(tables) < len(columns):
        return _Photos([], np.empty((0, 2)))
    rows = tables["seq_info.csv"]
    keys = rows.texts("key").to_pylist()
    takes_part = np.array([key is not None for key in keys], bool)
    for i in np.flatnonzero(~takes_part):
        problems.add(f"{rows.where(int(i))}: {rows.cell('key', int(i))}; expected the name of a photo")
    takes_part &= _flags(tables["subtask_index.csv"], str(config.subtask), problems)
    utm_m = np.full((len(rows), 2), np.nan)
    if config.split is MslsSplit.train_val:
        takes_part &= ~_flags(tables["raw.csv"], "pano", problems)
        positions = tables["postprocessed.csv"]
        utm_m = np.stack([positions.floats("easting"), positions.floats("northing")], axis=1)
        for i, axis in np.argwhere(np.isnan(utm_m) & takes_part[:, None]).tolist():
            name = ("easting", "northing")[axis]
            problems.add(f"{positions.where(i)}: {positions.cell(name, i)}; expected a number")
        takes_part &= ~np.isnan(utm_m).any(axis=1)
    taken = np.flatnonzero(takes_part)
    names = [f"images/{keys[i]}.jpg" for i in taken]
    there = _photos_in(folder, len(names), problems)
    if there:
        paths = listed_paths(names, there, folder, lambda i: rows.where(int(taken[i])), problems)
        photos = _Photos([f"{city}/{part}/{path}" for path in paths], utm_m[taken])
        return photos.only(np.array([path is not None for path in paths], bool))
    return _Photos([], np.empty((0, 2)))


def _is_there(url: str) -> bool:
    try:
        return storage.exists(url)
    except OSError as error:
        raise UserError(f"{url}: can't be read: {storage.reason(error)}") from error


def _photos_in(folder: str, num_listed: int, problems: Problems) -> set[str]:
    """Paths of all photos below `folder`. If none exists although some are listed, that is one problem."""
    images = storage.join(folder, "images")
    try:
        there = {f"images/{name}" for name in storage.list_files(images)}
    except OSError as error:
        problems.add(f"{images}: can't be read: {storage.reason(error)}")
        return set()
    if not there and num_listed:
        problems.add(f"{images}: no photo there; expected the {num_listed:,} that the CSV files name")
    return there


def _read_tables(folder: str, columns: dict[str, list[str]], problems: Problems) -> dict[str, Rows]:
    """The rows common to all tables, by file; an unreadable table is a problem and left out."""
    tables: dict[str, Rows] = {}
    for name, wanted in columns.items():
        with problems.gathered():
            tables[name] = TableFile.open(storage.join(folder, name)).read(wanted, problems)
    if not tables:
        return tables
    _check_lengths(list(tables.values()), problems)
    common = reduce(np.intersect1d, [rows.numbers for rows in tables.values()])
    tables = {name: _only(rows, np.isin(rows.numbers, common)) for name, rows in tables.items()}
    if "seq_info.csv" in tables:
        for rows in tables.values():
            if "key" in rows.columns.column_names:
                _check_keys(rows, tables["seq_info.csv"], problems)
    return tables


def _only(rows: Rows, kept: NDArray[np.bool_]) -> Rows:
    return Rows(rows.url, rows.columns.filter(pa.array(kept)), rows.numbers[kept])


def _check_lengths(tables: Sequence[Rows], problems: Problems) -> None:
    """Add a problem for a truncated file, which ends before the others."""
    last = [int(rows.numbers[-1]) if len(rows) else 1 for rows in tables]
    longest = tables[int(np.argmax(last))]
    for rows, its_last in zip(tables, last, strict=True):
        if its_last < max(last):
            problems.add(f"{rows.url}: its last whole row is {its_last}; expected {max(last)}, as in {longest.url}")


def _check_keys(rows: Rows, listed: Rows, problems: Problems) -> None:
    keys, expected = (table.columns.column("key").to_pylist() for table in (rows, listed))
    differ = [i for i, (key, its_key) in enumerate(zip(keys, expected, strict=True)) if key != its_key]
    if differ:
        i = differ[0]
        problems.add(
            f"{rows.where(i)}: {rows.cell('key', i)}; expected the same as in {listed.where(i)}, "
            f"in this row and {len(differ) - 1:,} others"
        )


def _flags(rows: Rows, name: str, problems: Problems) -> NDArray[np.bool_]:
    """(n,) a column of True and False; anything else is a problem and counts as False."""
    found = np.zeros(len(rows), bool)
    for i, text in enumerate(rows.texts(name).to_pylist()):
        flag = _FLAGS.get((text or "").strip().lower())
        if flag is None:
            problems.add(f"{rows.where(i)}: {rows.cell(name, i)}; expected True or False")
        found[i] = bool(flag)
    return found
