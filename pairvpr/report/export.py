"""`pairvpr export OUT --to FORMAT`: a run's answers as other tools read them (docs/report.md).

hloc, colmap: a line for each pair, `query database`. kapture: a pairs file, `query, map, score`. geojson: a point for
each query where it was answered to be. csv: a row for each answer, with latitude and longitude.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import posixpath
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pairvpr.data import storage, utm
from pairvpr.data.claim import check_writable_file
from pairvpr.data.pairs import hloc_lines
from pairvpr.data.utm import UtmZone
from pairvpr.errors import UserError
from pairvpr.report.finished import FinishedRun, open_run
from pairvpr.report.outcomes import rows_of
from pairvpr.secrets import without_secrets
from pairvpr.where import Map

FILES = {
    "hloc": "pairs-hloc.txt",
    "colmap": "pairs-colmap.txt",
    "kapture": "pairs-kapture.txt",
    "geojson": "queries.geojson",
    "csv": "answers.csv",
}
"""Formats, each with the name of its file in the run's directory."""
NUM_ANSWERS = 10
ANSWER_COLUMNS = (
    *("query", "rank", "database", "score", "confidence", "in_map", "latitude", "longitude"),
    *("utm_east_m", "utm_north_m", "error_m", "right"),
)


@dataclass(frozen=True)
class Export:
    """What is written of a run: its first `num_answers` final answers to each query."""

    run: FinishedRun
    num_answers: int
    zone: UtmZone | None
    """Of its metres; None where that is not known."""

    def text(self, form: str) -> Iterator[bytes]:
        """The file in one of `FILES`, piece by piece. Raises `UserError` for a name that the format can't hold."""
        if form in ("hloc", "colmap"):
            yield from (hloc_lines((query, name) for query, name, _ in self._pairs(row)) for row in self._rows())
        elif form == "kapture":
            yield b"# kapture format: 1.1\n# query_image, map_image, score\n"
            yield from (_kapture_line(*pair) for row in self._rows() for pair in self._pairs(row))
        elif form == "csv":
            yield _csv_lines([ANSWER_COLUMNS])
            yield from (_csv_lines(self._answer_rows(row)) for row in self._rows())
        else:
            yield from self._geojson()

    def _rows(self) -> Iterator[dict[str, Any]]:
        return rows_of(self.run, np.arange(len(self.run.queries)))

    @cached_property
    def _folders(self) -> tuple[str, str]:
        """What stands before the names of queries and database photos: their folders, where one folder holds both."""
        roots = [self.run.queries.root.rstrip("/"), self.run.database.root.rstrip("/")]
        parents = {posixpath.dirname(root) for root in roots}
        both = roots[0] != roots[1] and len(parents) == 1
        names = [f"{posixpath.basename(root)}/" if both else "" for root in roots]
        return names[0], names[1]

    def _final(self, row: Mapping[str, Any]) -> list[tuple[int, float]]:
        """Ids and scores of the first answers, best first; more is better, so a squared distance is negative."""
        sign = -1 if self.run.order.is_retrieval else 1
        return [(image_id, sign * score) for image_id, score in zip(*self.run.order.of(row), strict=True)][
            : self.num_answers
        ]

    def _pairs(self, row: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
        queries, database = self._folders
        for image_id, score in self._final(row):
            yield queries + row["query_path"], database + self._paths[image_id].as_py(), score

    @cached_property
    def _paths(self) -> Any:
        return self.run.database.path_column

    @cached_property
    def _utm_m(self) -> NDArray[np.float64]:
        return self.run.database.utm_m

    @cached_property
    def _queries_m(self) -> NDArray[np.float64]:
        return self.run.queries.utm_m

    def _degrees(self, utm_m: NDArray[np.float64]) -> tuple[float | None, float | None]:
        """Latitude and longitude of a position (2,); None where it, or the zone, is not known."""
        if self.zone is None or np.isnan(utm_m).any():
            return None, None
        latitude, longitude = utm.to_degrees(utm_m[None], self.zone)[0].tolist()
        return round(latitude, 8), round(longitude, 8)

    def _answer_rows(self, row: Mapping[str, Any]) -> Iterator[list[Any]]:
        """The rows of CSV for one query, by `ANSWER_COLUMNS`; an unanswered one has none."""
        queries, database = self._folders
        positives = None if row["positives"] is None else set(row["positives"])
        for rank, (image_id, score) in enumerate(self._final(row), start=1):
            at_m = self._utm_m[image_id]
            yield [
                *(queries + row["query_path"], rank, database + self._paths[image_id].as_py()),
                *(_finite(score), row["confidence"] if rank == 1 else None, row["in_map"] if rank == 1 else None),
                *(*self._degrees(at_m), *map(_finite, at_m.tolist())),
                _finite(math.hypot(*(at_m - self._queries_m[row["query_id"]]))),
                None if positives is None else image_id in positives,
            ]

    def _geojson(self) -> Iterator[bytes]:
        """A collection with a feature for each query; without a position its geometry is null, as RFC 7946 has it."""
        yield b'{"type": "FeatureCollection", "features": ['
        for number, row in enumerate(self._rows()):
            yield (",\n" if number else "\n").encode() + json.dumps(self._feature(row), ensure_ascii=False).encode()
        yield b"\n]}\n"

    def _feature(self, row: Mapping[str, Any]) -> dict[str, Any]:
        best = next(iter(self._final(row)), None)
        at_m = np.full(2, np.nan)
        if row.get("estimated_east_m") is not None:
            at_m = np.array([row["estimated_east_m"], row["estimated_north_m"]])
        elif best is not None:
            at_m = self._utm_m[best[0]]
        latitude, longitude = self._degrees(at_m)
        queries, database = self._folders
        positives = row["positives"]
        return {
            "type": "Feature",
            "geometry": None if latitude is None else {"type": "Point", "coordinates": [longitude, latitude]},
            "properties": {
                "query": queries + row["query_path"],
                "answer": None if best is None else database + self._paths[best[0]].as_py(),
                "score": None if best is None else _finite(best[1]),
                "confidence": row["confidence"],
                "in_map": row["in_map"],
                "error_m": _finite(math.hypot(*(at_m - self._queries_m[row["query_id"]]))),
                "right": None if positives is None else best is not None and best[0] in positives,
            },
        }


def _kapture_line(query: str, name: str, score: float) -> bytes:
    for text in (query, name):
        if any(char in text for char in ",\n\r#") or text != text.strip():
            raise UserError(f"{text!r}: kapture's pairs can't hold a name with a comma, # or outer white space")
    return f"{query}, {name}, {score!r}\n".encode()


def _csv_lines(rows: Iterator[list[Any]] | Sequence[Sequence[Any]]) -> bytes:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue().encode()


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def export(
    url: str, form: str, *, output: str | None = None, num_answers: int = NUM_ANSWERS, epsg: int | None = None
) -> str:
    """Write one of `FILES`; returns its path or URL.

    Raises `UserError` for what is no finished run, an unknown format, positions that the format needs and the run does
    not have, and where the file can't be written.
    """
    if form not in FILES:
        raise UserError(f"--to {form}: expected one of {', '.join(FILES)}")
    if num_answers < 1:
        raise UserError(f"--top {num_answers}: expected 1 or more")
    target = output or storage.join(url, FILES[form])
    check_writable_file(target, "--output", "the export")
    run = open_run(url)
    zone = Map(run.database, epsg).zone if form in ("geojson", "csv") else None
    if form == "geojson" and np.isnan(run.database.utm_m).all():
        raise UserError(f"{url}: the run knows no photo's position, which --to geojson needs")
    if form == "geojson" and zone is None:
        raise UserError(
            f"{url}: the run knows metres, but not of which UTM zone; expected --epsg, the zone's EPSG code (32610 is "
            "zone 10 north)"
        )
    try:
        with storage.written_locally(target) as path, path.open("wb") as file:
            file.writelines(Export(run, num_answers, zone).text(form))
    except OSError as error:
        raise UserError(f"--output {target}: can't be written: {storage.reason(error)}") from error
    return target


def main(arguments: Sequence[str]) -> int:
    """The command. Exit codes: 0 done, 2 a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="pairvpr export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="OUT", help="output directory (path or URL) of evaluate or query")
    parser.add_argument("--to", metavar="FORMAT", required=True, help=f"one of {', '.join(FILES)}")
    parser.add_argument("--output", metavar="FILE", help="file (path or URL) to write; by default in OUT")
    parser.add_argument("--top", metavar="N", type=int, default=NUM_ANSWERS, help="answers to each query (10)")
    parser.add_argument("--epsg", type=int, help="EPSG code of the positions' UTM zone, where names do not state it")
    given = parser.parse_args(arguments)
    try:
        written = export(given.run, given.to, output=given.output, num_answers=given.top, epsg=given.epsg)
    except UserError as error:
        print(f"error: {without_secrets(str(error))}", file=sys.stderr)
        return 2
    print(without_secrets(written))
    return 0
