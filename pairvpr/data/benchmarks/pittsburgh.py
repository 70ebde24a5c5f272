"""Pittsburgh: `datasets/<list>.mat` holds a struct `dbStruct` with names and UTM of database and query photos.

Database photos lie in `000/`, `001/`, ... below the root, query photos in the same folders below `queries_real/`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pairvpr.config.benchmark_schema import PittsburghConfig
from pairvpr.data import storage
from pairvpr.data.benchmarks.listed import listed_paths
from pairvpr.data.benchmarks.truth import positives_from_table, with_tables
from pairvpr.data.manifest import Benchmark, Manifest
from pairvpr.data.mat_file import MatError, MatValue, NewerMatError, read_variable
from pairvpr.data.positives import within_radius
from pairvpr.data.problems import Problems
from pairvpr.errors import UserError

QUERIES_FOLDER = "queries_real"
_FIELDS = {"database": ("dbImageFns", "utmDb"), "queries": ("qImageFns", "utmQ")}


@dataclass(frozen=True, eq=False)
class ListedPhotos:
    """Names of photos and (n, 2) UTM east, north in metres, in list order; `where` names the list in messages."""

    where: str
    names: list[str]
    utm_m: NDArray[np.float64]


def load(config: PittsburghConfig, problems: Problems) -> Benchmark:
    """Photos in list order; positives within a radius, or as benchmark.positives lists them."""
    listed: dict[str, ListedPhotos] = {}
    with problems.gathered():
        listed = read_db_struct(config.db_struct)
    root = storage.absolute(config.root)
    try:
        there = storage.list_files(root)
    except OSError as error:
        raise UserError(f"benchmark.root={config.root}: can't be read: {storage.reason(error)}") from error
    if not there:
        raise UserError(f"benchmark.root={config.root}: nothing there; expected the folders 000/ and {QUERIES_FOLDER}/")
    in_queries = [path.removeprefix(f"{QUERIES_FOLDER}/") for path in there if path.startswith(f"{QUERIES_FOLDER}/")]
    for folder, has_photos in (("000/", len(there) > len(in_queries)), (f"{QUERIES_FOLDER}/", bool(in_queries))):
        if not has_photos:
            problems.add(
                f"benchmark.root={config.root}: no photo in {folder} there; expected those that the list names"
            )
    if not listed or not in_queries or len(there) == len(in_queries):
        problems.raise_if_any()
    database = _manifest(root, there, listed["database"], problems)
    queries = _manifest(storage.join(root, QUERIES_FOLDER), in_queries, listed["queries"], problems)
    if not len(database) or not len(queries):
        problems.raise_if_any()
    database, queries = with_tables(config, database, queries, problems)
    if config.positives is not None:
        positives = positives_from_table(config.positives, queries, database, problems)
        protocol: dict[str, object] = {"positives": "list", "radius_m": None}
    else:
        positives = within_radius(queries.utm_m, database.utm_m, config.radius_m)
        protocol = {"positives": "radius", "radius_m": config.radius_m}
    return Benchmark(name=config.name, database=database, queries=queries, positives=positives, protocol=protocol)


def read_db_struct(url: str) -> dict[str, ListedPhotos]:
    """`database` and `queries` of a MATLAB file. Raises `UserError`, naming the file and the field."""
    try:
        data = storage.read_bytes(url)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(f"benchmark.db_struct={url}: no such file; expected a MATLAB file with dbStruct") from error
    except OSError as error:
        raise UserError(f"benchmark.db_struct={url}: can't be read: {storage.reason(error)}") from error
    try:
        struct = read_variable(data, "dbStruct")
    except MatError as error:
        prefix = "" if isinstance(error, NewerMatError) else "not a MATLAB file, or a damaged one: "
        raise UserError(f"{url}: {prefix}{error}") from error
    fields = struct if isinstance(struct, dict) else {}
    missing = [name for names in _FIELDS.values() for name in names if name not in fields]
    if missing:
        raise UserError(f"{url}: no {', '.join(missing)} in dbStruct; expected dbImageFns, utmDb, qImageFns, utmQ")
    return {part: _listed(url, fields, *names) for part, names in _FIELDS.items()}


def _listed(url: str, fields: dict[str, MatValue], names_field: str, utm_field: str) -> ListedPhotos:
    values, utm = fields[names_field], fields[utm_field]
    names = [value for value in (values if isinstance(values, list) else [values]) if isinstance(value, str)]
    if not isinstance(utm, np.ndarray) or (isinstance(values, list) and len(names) != len(values)):
        raise UserError(f"{url}: dbStruct.{names_field} holds no names, or dbStruct.{utm_field} no numbers")
    utm_m = utm.T
    if utm_m.shape != (len(names), 2):
        raise UserError(
            f"{url}: {utm_field} of dbStruct is {' x '.join(map(str, utm_m.T.shape))}; "
            f"expected 2 x {len(names)}, one column for each of {names_field}"
        )
    return ListedPhotos(f"{url}, {names_field}", names, utm_m)


def _manifest(folder: str, there: list[str], listed: ListedPhotos, problems: Problems) -> Manifest:
    """The usable photos of a list; the others are problems."""

    def where(i: int) -> str:
        return f"{listed.where} row {i + 1}"

    paths = listed_paths(listed.names, there, folder, where, problems)
    has_position = np.isfinite(listed.utm_m).all(axis=1)
    for i in np.flatnonzero(~has_position).tolist():
        problems.add(f"{where(i)}: {listed.names[i]} has the position {listed.utm_m[i].tolist()}; expected numbers")
    kept = {i: path for i in np.flatnonzero(has_position).tolist() if (path := paths[i]) is not None}
    return Manifest.of(folder, list(kept.values()), listed.utm_m[list(kept)])
