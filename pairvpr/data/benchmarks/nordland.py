"""Nordland: video frames of one railway journey in several seasons, aligned frame by frame.

Each folder holds frames 0, 1, 2, ... without gaps. A frame's number is its name, `0000017.jpg`, or follows from an
`@`-name, whose position is the number times `FRAME_SPACING_M`.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from pairvpr.config.benchmark_schema import NordlandConfig
from pairvpr.data.benchmarks.truth import positives_from_table, with_tables
from pairvpr.data.manifest import Benchmark, Manifest, folder_manifest
from pairvpr.data.problems import Problems

FRAME_SPACING_M = 25 / 10.5
"""Artificial distance between neighbouring frames in `@`-names: a radius of 25 m covers 10 frames, not 11."""
_MOST_FRAMES = 10**9
_NAME_PRECISION_M = 0.11  # such names are truncated to one decimal


def load(config: NordlandConfig, problems: Problems) -> Benchmark:
    """Photos sorted by path; positives by frame number, or as benchmark.positives lists them."""
    found: dict[str, Manifest] = {}
    for part, folder in (("database", config.database), ("queries", config.queries)):
        with problems.gathered():
            found[part] = folder_manifest(folder, f"benchmark.{part}")
    if len(found) < 2:
        problems.raise_if_any()
    database, database_frames = _numbered(found["database"], "benchmark.database", problems)
    queries, query_numbers = _numbered(found["queries"], "benchmark.queries", problems)
    if not len(database) or not len(queries):
        problems.raise_if_any()
    database, queries = with_tables(config, database, queries, problems)
    if config.positives is not None:
        positives = positives_from_table(config.positives, queries, database, problems)
        protocol: dict[str, object] = {"positives": "list", "radius_m": None}
    else:
        query_frames = query_numbers * config.frames_per_query
        positives = within_frames(query_frames, database_frames, config.tolerance_frames)
        protocol = {
            "positives": "frames",
            "radius_m": None,
            "tolerance_frames": config.tolerance_frames,
            "frames_per_query": config.frames_per_query,
        }
    return Benchmark(name=config.name, database=database, queries=queries, positives=positives, protocol=protocol)


def within_frames(
    query_frames: NDArray[np.int64], database_frames: NDArray[np.int64], tolerance_frames: int
) -> list[NDArray[np.int64]]:
    """For each query the ids of database photos at most `tolerance_frames` away, ascending.

    A photo's id is its position in `database_frames` (n,); query q shows frame `query_frames[q]`.
    """
    order = np.argsort(database_frames)
    ordered = database_frames[order]
    first = np.searchsorted(ordered, query_frames - tolerance_frames, side="left")
    end = np.searchsorted(ordered, query_frames + tolerance_frames, side="right")
    return [np.sort(order[start:stop]) for start, stop in zip(first, end, strict=True)]


def frame_number(path: str) -> int | None:
    """The frame number in a name, from 0; None if there is none."""
    name = PurePosixPath(path).stem
    if name.isdecimal() and name.isascii():
        return int(name) if len(name) <= len(str(_MOST_FRAMES)) else None
    try:
        _, east_m, north_m, *_ = name.split("@")
        distance_m = float(east_m) + float(north_m)  # one of them is 0
        number = round(distance_m / FRAME_SPACING_M)
    except (ValueError, OverflowError):
        return None
    return (
        number
        if 0 <= number < _MOST_FRAMES and abs(distance_m - number * FRAME_SPACING_M) < _NAME_PRECISION_M
        else None
    )


def _numbered(photos: Manifest, key: str, problems: Problems) -> tuple[Manifest, NDArray[np.int64]]:
    """The photos that are frames, and their numbers (n,).

    Names without a number, repeated numbers and missing numbers are problems.
    """
    first: dict[int, str] = {}
    for path in photos.paths:
        number = frame_number(path)
        if number is None:
            problems.add(
                f"{key}: {photos.root}/{path}: no frame number in its name; expected 0000000.jpg, 0000001.jpg, ... or "
                "@-names one frame apart"
            )
        elif number in first:
            problems.add(f"{key}: {photos.root}/{path} and {first[number]} are both frame {number}; expected one")
        else:
            first[number] = path
    for before, after in pairwise([-1, *sorted(first)]):
        if after - before > 1:
            frames = f"frame {after - 1}" if after - before == 2 else f"frames {before + 1} to {after - 1}"
            problems.add(f"{key}: {photos.root}: no {frames} before {first[after]}; expected 0, 1, 2, ...")
    return Manifest.of(photos.root, list(first.values())), np.fromiter(first, np.int64, len(first))
