"""Pairs of a query and a database photo in a file: which candidates each query has. P pairs.

Text as hloc (Hierarchical-Localization) reads and writes it, `query database` or `query database score` a line, or
Parquet with the columns `query`, `database` and, if there are any, `score`. A higher score is a better candidate;
without scores a query's candidates stand in the file best first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import compute

from pairvpr.data import storage
from pairvpr.data.manifest import Manifest
from pairvpr.errors import UserError

pc: Any = compute  # its functions are made at run time, so their types are not known

_PARQUET_MAGIC = b"PAR1"
_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
EXPECTED = "expected lines of `query database` or `query database score`, or Parquet with query, database and score"


@dataclass(frozen=True, eq=False)
class Pairs:
    """Names of queries (P,) and database photos (P,), and the pairs' scores (P,), if they have some."""

    queries: pa.ChunkedArray
    database: pa.ChunkedArray
    scores: NDArray[np.float64] | None
    sha256: str
    """Of the file."""


def read_pairs(url: str, key: str) -> Pairs:
    """The pairs in a file (path or URL); `key` is the setting that names it.

    Raises `UserError` for a file that can't be read, is damaged or holds no pair, and for a line or row that is none.
    """
    try:
        data = storage.read_bytes(url)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(f"{key}={url}: no such file; {EXPECTED}") from error
    except OSError as error:
        raise UserError(f"{key}={url}: can't be read: {storage.reason(error)}") from error
    read = _from_parquet if data.startswith(_PARQUET_MAGIC) else _from_text
    queries, database, scores = read(f"{key}={url}", data)
    if not len(queries):
        raise UserError(f"{key}={url}: no pair in it; {EXPECTED}")
    if scores is not None and not np.isfinite(scores).all():
        raise UserError(f"{key}={url}, pair {1 + int(np.argmin(np.isfinite(scores)))}: its score is not finite")
    return Pairs(queries, database, scores, hashlib.sha256(data).hexdigest())


def hloc_lines(pairs: Iterable[tuple[str, str] | tuple[str, str, float]]) -> bytes:
    """The text that hloc reads: a line for each pair of names, with its score if it has one.

    Raises `UserError` for a name with white space in it, which parts the columns of such a file.
    """
    lines = []
    for query, database, *score in pairs:
        for name in (query, database):
            if len(name.split()) != 1:
                raise UserError(f"{name!r}: hloc's pairs can't hold a name with white space; expected other names")
        lines.append(" ".join([query, database, *map(repr, score)]))
    return "".join(f"{line}\n" for line in lines).encode()


def candidates_of(
    pairs: Pairs,
    url: str,
    key: str,
    queries: Manifest,
    database: Manifest,
    live: NDArray[np.int64] | None = None,
) -> dict[int, NDArray[Any]]:
    """Ids (int64) of each query's candidates, best first, by the ids of the queries that have some.

    A name is relative to the folder of its photos or, where all names of that kind are, to the folder that holds both.
    `live`, if given, are the ids of the database photos that can be named; of several at one path the first is meant.
    Raises `UserError`, naming the first, for photos that are not there and for a pair that is there twice.
    """
    query_ids = _ids(pairs.queries, queries, database.root, f"{key}={url}: the query")
    what = f"{key}={url}: the database photo"
    if live is None:
        image_ids = _ids(pairs.database, database, queries.root, what)
    else:
        image_ids = live[_ids(pairs.database, database.only(live), queries.root, what, "in the index of")]
    # Stable: equal ones, and those without scores, stay in the order of the file.
    order = np.argsort(query_ids, kind="stable")
    if pairs.scores is not None:
        order = np.lexsort((np.arange(len(order)), -pairs.scores, query_ids))
    numbers = query_ids * len(database) + image_ids
    _, firsts, counts = np.unique(numbers, return_index=True, return_counts=True)
    if (counts > 1).any():
        twice = int(firsts[counts > 1].min())
        raise UserError(
            f"{key}={url}: the pair {pairs.queries[twice]} {pairs.database[twice]} is there twice; expected it once"
        )
    asked, starts = np.unique(query_ids[order], return_index=True)
    pieces = np.split(image_ids[order], starts[1:])
    return {int(query_id): piece for query_id, piece in zip(asked, pieces, strict=True)}


def _ids(
    names: pa.ChunkedArray, photos: Manifest, other_root: str, what: str, where: str = "below"
) -> NDArray[np.int64]:
    """(P,) ids of the photos of these names. Raises `UserError` for `what` is not `where`."""
    ids = photos.ids_of(names)
    if (ids < 0).any():
        below = _below_common_folder(photos.root, other_root)
        if below and pc.all(pc.starts_with(names, pattern=below)).as_py():
            ids = photos.ids_of(pc.utf8_slice_codeunits(names, start=len(below)))
    if (ids < 0).any():
        unknown = pc.unique(names.filter(pa.array(ids < 0)))
        more = f" (nor are {len(unknown) - 1:,} more)" if len(unknown) > 1 else ""
        raise UserError(
            f"{what} {unknown[0]} is not {where} {photos.root}{more}; expected names of photos relative to it"
        )
    return ids


def _below_common_folder(root: str, other_root: str) -> str:
    """`root` relative to the folder that holds both roots, with a slash at its end; empty where there is none."""
    parts, others = root.rstrip("/").split("/"), other_root.rstrip("/").split("/")
    num_common = next((i for i, pair in enumerate(zip(parts, others, strict=False)) if pair[0] != pair[1]), 0)
    return "/".join(parts[num_common:]) + "/" if num_common else ""


def _from_text(named: str, data: bytes) -> tuple[pa.ChunkedArray, pa.ChunkedArray, NDArray[np.float64] | None]:
    try:
        lines = pa.array(data.decode("utf-8-sig").splitlines(), pa.string())
    except UnicodeDecodeError as error:
        raise UserError(f"{named}: not UTF-8; {EXPECTED}") from error
    lines = pc.utf8_trim_whitespace(lines)
    is_used = pc.not_equal(lines, "")
    numbers = np.flatnonzero(is_used.to_numpy(zero_copy_only=False)) + 1
    cells = pc.utf8_split_whitespace(lines.filter(is_used))
    counts = pc.list_value_length(cells).to_numpy().astype(np.int64)
    width = int(counts[0]) if len(counts) else 2
    is_wrong = (counts != width) | (width not in (2, 3))
    if is_wrong.any():
        first = int(np.argmax(is_wrong))
        raise UserError(
            f"{named}, line {numbers[first]}: {counts[first]} columns"
            + (f", the first line has {width}" if width in (2, 3) else "")
            + f"; {EXPECTED}"
        )
    columns = [pa.chunked_array([pc.list_element(cells, place)]) for place in range(width)]
    if width == 2:
        return columns[0], columns[1], None
    is_number = pc.match_substring_regex(columns[2], _NUMBER).to_numpy()
    if not is_number.all():
        first = int(np.argmin(is_number))
        raise UserError(f"{named}, line {numbers[first]}: the score {columns[2][first]} is not a number; {EXPECTED}")
    return columns[0], columns[1], columns[2].cast(pa.float64()).to_numpy()


def _from_parquet(named: str, data: bytes) -> tuple[pa.ChunkedArray, pa.ChunkedArray, NDArray[np.float64] | None]:
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        names = file.schema_arrow.names
        wanted = [name for name in ("query", "database", "score") if name in names]
        if len(wanted) < 2 or wanted[:2] != ["query", "database"]:
            raise UserError(f"{named}: its columns are {', '.join(names)}; {EXPECTED}")
        table = file.read(columns=wanted)
        columns: Sequence[pa.ChunkedArray] = [
            table.column(name).cast(pa.float64() if name == "score" else pa.string()) for name in wanted
        ]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{named}: not a Parquet file of pairs: {storage.reason(error)}; {EXPECTED}") from error
    for name, column in zip(wanted, columns, strict=True):
        if column.null_count:
            first = 1 + int(np.argmax(column.is_null().to_numpy()))
            raise UserError(f"{named}, pair {first}: no {name}; {EXPECTED}")
    return columns[0], columns[1], columns[2].to_numpy() if len(columns) == 3 else None
