"""Mapillary Street-Level Sequences, read from the CSV files of its download.

Each `<split>/<city>/{query,database}/` holds `images/<key>.jpg` and tables whose rows are matched by row number:
seq_info.csv (key), subtask_index.csv (a column per subtask), postprocessed.csv (key, easting, northing; in test only
with its ground truth) and, only read for train_val, raw.csv (key, pano). Other columns are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pairvpr.config.benchmark_schema import MslsConfig, MslsSplit, MslsSubtask
from pairvpr.data import storage
from pairvpr.data.benchmarks.listed import listed_paths
from pairvpr.data.benchmarks.truth import positives_from_table, with_tables
from pairvpr.data.manifest import Benchmark, Manifest
from pairvpr.data.positives import within_radius
from pairvpr.data.problems import Problems
from pairvpr.data.tables import Rows, TableFile
from pairvpr.errors import UserError

POSITIONS, AXES = "postprocessed.csv", ("easting", "northing")
"""The table of positions, and its columns."""
SUBTASKS = "subtask_index.csv"
_KINDS = {"light": (POSITIONS, "night"), "sequence": ("seq_info.csv", "sequence_key")}
"""Tables and columns that group queries; a table may lack them."""
_BY_SUBTASK = {str(name): (SUBTASKS, str(name)) for name in MslsSubtask if name is not MslsSubtask.all}
"""The same for the subtasks that a query of `all` may belong to."""
_FLAGS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True, eq=False)
class _Photos:
    """Photos of one city's database or queries, in row order: paths below the split's folder."""

    paths: list[str]
    utm_m: NDArray[np.float64]
    """(n, 2) UTM east, north; NaN where the tables hold no positions."""
    kinds: Mapping[str, NDArray[np.str_ | np.bool_]] = field(default_factory=dict)
    """(n,) by kind, as far as the tables hold it: names of the queries' groups, or flags of a subtask."""

    def __len__(self) -> int:
        return len(self.paths)

    def only(self, kept: NDArray[np.bool_]) -> _Photos:
        paths = [path for path, is_kept in zip(self.paths, kept, strict=True) if is_kept]
        return _Photos(paths, self.utm_m[kept], {name: its[kept] for name, its in self.kinds.items()})


@dataclass(frozen=True, eq=False)
class _Part:
    """The database or the queries of all cities."""

    photos: Manifest
    city: NDArray[np.int64]
    """(n,) place of each photo's city in benchmark.cities."""
    kinds: Mapping[str, NDArray[np.str_ | np.bool_]]
    """The same of all cities, as far as each city's tables hold it."""

    def only(self, ids: NDArray[np.int64]) -> _Part:
        return _Part(self.photos.take(ids), self.city[ids], {name: its[ids] for name, its in self.kinds.items()})


def load(config: MslsConfig, problems: Problems) -> Benchmark:
    """The cities in sequence, with rows in table order.

    train_val: without panoramas, and queries without a positive are dropped. test: all rows of the subtask, since a
    submission has a line for each. Positives are the listed ones, or those within a radius and the city, since cities
    lie in different UTM zones. Only test may hold neither: then there is no ground truth.
    """
    root = storage.join(storage.absolute(config.root), config.split)
    if not _is_there(root):
        raise UserError(f"benchmark.root={config.root}: it has no folder {config.split}/; expected the MSLS download")
    found: dict[str, _Part] = {}
    for part in ("database", "query"):
        with problems.gathered():
            found[part] = _read_part(root, part, config, problems)
    if len(found) < 2:
        problems.raise_if_any()
    database, queries = _with_tables(found["database"], found["query"], config, problems)
    positives, rule = _positives(queries, database, config, problems)
    protocol: dict[str, object] = {**rule, "subtask": str(config.subtask), "cities": list(config.cities)}
    if config.split is MslsSplit.train_val:
        assert positives is not None, "its tables hold positions"
        kept = np.flatnonzero([len(ids) > 0 for ids in positives])
        if not len(kept):
            raise _nothing_left(root, "query photo with a positive", config, problems)
        num_dropped = len(positives) - len(kept)
        protocol |= {"queries_without_positives": "dropped", "num_queries_dropped": num_dropped}
        queries, positives = queries.only(kept), [positives[i] for i in kept]
    return Benchmark(
        name=config.name,
        database=database.photos,
        queries=queries.photos,
        positives=positives,
        protocol=protocol,
        query_groups=[config.cities[i] for i in queries.city],
        query_kinds={name: its.tolist() for name, its in queries.kinds.items() if name in _KINDS},
        query_subtasks=_subtasks(queries.kinds),
        has_submission=config.split is MslsSplit.test,
    )


def _kinds(part: str, config: MslsConfig) -> dict[str, tuple[str, str]]:
    """Tables and columns of what groups this benchmark's queries; the database has no groups."""
    if part != "query":
        return {}
    return _KINDS | (_BY_SUBTASK if config.subtask is MslsSubtask.all else {})


def _subtasks(kinds: Mapping[str, NDArray[np.str_ | np.bool_]]) -> dict[str, NDArray[np.int64]]:
    """Ids of the queries of each subtask that has any."""
    found = {name: np.flatnonzero(kinds[name]) for name in _BY_SUBTASK if name in kinds}
    return {name: ids for name, ids in found.items() if len(ids)}


def _with_tables(database: _Part, queries: _Part, config: MslsConfig, problems: Problems) -> tuple[_Part, _Part]:
    placed = with_tables(config, database.photos, queries.photos, problems, have_keys=True)
    return replace(database, photos=placed[0]), replace(queries, photos=placed[1])


def _positives(
    queries: _Part, database: _Part, config: MslsConfig, problems: Problems
) -> tuple[list[NDArray[np.int64]] | None, dict[str, object]]:
    """Positives of each query, and the rule that they follow; None where nothing says who shows the same place."""
    if config.positives is not None:
        found = positives_from_table(config.positives, queries.photos, database.photos, problems, have_keys=True)
        return found, {"positives": "list", "radius_m": None}
    query_m, database_m = queries.photos.utm_m, database.photos.utm_m
    if np.isnan(query_m).any() or np.isnan(database_m).any():
        return None, {"positives": "none", "radius_m": None}
    positives: list[NDArray[np.int64]] = []
    for city in range(len(config.cities)):
        here = np.flatnonzero(database.city == city)
        found = within_radius(query_m[queries.city == city], database_m[here], config.radius_m)
        positives += [here[ids] for ids in found]
    return positives, {"positives": "radius, within the city", "radius_m": config.radius_m}


def _read_part(root: str, part: str, config: MslsConfig, problems: Problems) -> _Part:
    """The photos of all cities' database or queries. Raises `UserError` if there are none."""
    has_positions = _have_positions(root, part, config, problems)
    cities = [_read_photos(root, city, part, config, has_positions, problems) for city in config.cities]
    if not sum(map(len, cities)):
        raise _nothing_left(root, f"{part} photo", config, problems)
    paths = [path for its in cities for path in its.paths]
    photos = Manifest.of(root, paths, np.concatenate([its.utm_m for its in cities]))
    known = [its.kinds for its in cities if len(its)]
    in_all = [name for name in _kinds(part, config) if all(name in its for its in known)]
    kinds = {name: np.concatenate([its[name] for its in known]) for name in in_all}
    return _Part(photos, np.repeat(np.arange(len(cities)), [len(its) for its in cities]), kinds)


def _have_positions(root: str, part: str, config: MslsConfig, problems: Problems) -> bool:
    """Whether the tables of a part hold positions: always in train_val, in test where its ground truth was added.

    A city without, where others have them, is a problem.
    """
    if config.split is MslsSplit.train_val:
        return True
    urls = [storage.join(root, city, part, POSITIONS) for city in config.cities]
    found = [_is_there(url) and TableFile.open(url).has(*AXES) for url in urls]
    if any(found) and not all(found):
        problems.add(
            f"{urls[found.index(False)]}: no table with {', '.join(AXES)}, but {urls[found.index(True)]} is one; "
            "expected it in all of benchmark.cities, or in none"
        )
    return all(found)


def _nothing_left(root: str, what: str, config: MslsConfig, problems: Problems) -> UserError:
    problems.raise_if_any()
    return UserError(
        f"{root}: no {what} of benchmark.subtask={config.subtask} in {', '.join(config.cities)}; expected another "
        "subtask or more cities"
    )


def _read_photos(
    root: str, city: str, part: str, config: MslsConfig, has_positions: bool, problems: Problems
) -> _Photos:
    """The photos of a city's database or queries that take part; none if a table is unusable."""
    folder = storage.join(root, city, part)
    if not _is_there(folder):
        problems.add(f"{folder}: no such folder; expected images/ and CSV files for a city of benchmark.cities")
        return _Photos([], np.empty((0, 2)))
    columns = {"seq_info.csv": ["key"], SUBTASKS: [str(config.subtask)]}
    if has_positions:
        columns[POSITIONS] = ["key", *AXES]
    if config.split is MslsSplit.train_val:
        columns["raw.csv"] = ["key", "pano"]
    wanted = _kinds(part, config)
    tables = _read_tables(folder, columns, list(wanted.values()), problems)
    if len(tables) < len(columns):
        return _Photos([], np.empty((0, 2)))
    rows = tables["seq_info.csv"]
    keys = rows.texts("key").to_pylist()
    takes_part = np.array([key is not None for key in keys], bool)
    for i in np.flatnonzero(~takes_part):
        problems.add(f"{rows.where(int(i))}: {rows.cell('key', int(i))}; expected the name of a photo")
    takes_part &= _flags(tables[SUBTASKS], str(config.subtask), problems)
    if "raw.csv" in tables:
        takes_part &= ~_flags(tables["raw.csv"], "pano", problems)
    utm_m = np.full((len(rows), 2), np.nan)
    if has_positions:
        utm_m = _positions_of(tables[POSITIONS], takes_part, problems)
        takes_part &= ~np.isnan(utm_m).any(axis=1)
    taken = np.flatnonzero(takes_part)
    names = [f"images/{keys[i]}.jpg" for i in taken]
    there = _photos_in(folder, len(names), problems)
    if there:
        paths = listed_paths(names, there, folder, lambda i: rows.where(int(taken[i])), problems)
        kinds = {
            name: _kind(name, tables[file], column, problems)[taken]
            for name, (file, column) in wanted.items()
            if file in tables and column in tables[file].columns.column_names
        }
        photos = _Photos([f"{city}/{part}/{path}" for path in paths], utm_m[taken], kinds)
        return photos.only(np.array([path is not None for path in paths], bool))
    return _Photos([], np.empty((0, 2)))


def _positions_of(rows: Rows, takes_part: NDArray[np.bool_], problems: Problems) -> NDArray[np.float64]:
    """(n, 2) UTM east, north; a row that takes part without a number is a problem."""
    utm_m = np.stack([rows.floats(name) for name in AXES], axis=1)
    for i, axis in np.argwhere(np.isnan(utm_m) & takes_part[:, None]).tolist():
        problems.add(f"{rows.where(i)}: {rows.cell(AXES[axis], i)}; expected a number")
    return utm_m


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


def _read_tables(
    folder: str, columns: dict[str, list[str]], optional: Sequence[tuple[str, str]], problems: Problems
) -> dict[str, Rows]:
    """The rows common to all tables, by file; an unreadable table is a problem and left out.

    Of the `optional` columns, each with its file, those that are there.
    """
    tables: dict[str, Rows] = {}
    for name, wanted in columns.items():
        with problems.gathered():
            file = TableFile.open(storage.join(folder, name))
            there = [column for its_file, column in optional if its_file == name and file.has(column)]
            tables[name] = file.read([*wanted, *there], problems)
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


def _kind(name: str, rows: Rows, column: str, problems: Problems) -> NDArray[np.str_ | np.bool_]:
    """(n,) flags of a subtask, or the names of the queries' groups: of `light` by the flag `night`, else as written."""
    if name in _BY_SUBTASK:
        return _flags(rows, column, problems)
    texts = rows.texts(column).to_pylist()
    if name == "light":
        by_flag = {True: "night", False: "day", None: "unknown"}
        return np.array([by_flag[_FLAGS.get((text or "").strip().lower())] for text in texts])
    return np.array([text or "unknown" for text in texts])


def _flags(rows: Rows, name: str, problems: Problems) -> NDArray[np.bool_]:
    """(n,) a column of True and False; anything else is a problem and counts as False."""
    found = np.zeros(len(rows), bool)
    for i, text in enumerate(rows.texts(name).to_pylist()):
        flag = _FLAGS.get((text or "").strip().lower())
        if flag is None:
            problems.add(f"{rows.where(i)}: {rows.cell(name, i)}; expected True or False")
        found[i] = bool(flag)
    return found
