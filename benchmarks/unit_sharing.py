"""How many photos re-ranking describes when queries share units, against one query at a time.

    python -m benchmarks.unit_sharing --report

Run it by hand from the root of the checkout; it takes some minutes and no network. Candidates are the nearest photos
of each query, by position: on a toy city's streets, and in a synthetic city of 100,000 photos along straight streets,
whose queries are frames of drives through it. Described are a unit's different candidates; with a cache of 100 photos
(157 MB of ViT-B's features in fp32) those that the cache does not have yet, one actor doing all units in order.
"""

from __future__ import annotations

import argparse
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

from benchmarks import shared
from pairvpr.retrieval.rerank import WorkUnit, work_units
from pairvpr.toy import city as toy_city

WHAT = "unit_sharing"
NUM_CANDIDATES = 100
CACHE_PHOTOS = 100
UNIT_SIZES = (1, 4, 8, 16, 32)
STREET_M, BLOCK_M, PHOTO_M = 5000.0, 100.0, 5.0
NUM_DRIVES, FRAMES, FRAME_M = 20, 50, 8.0


def in_query_order(candidates: Mapping[int, Sequence[int]], queries_per_unit: int) -> list[WorkUnit]:
    """Consecutive queries, whatever they share."""
    ids = list(candidates)
    return [
        WorkUnit(first, {query_id: candidates[query_id] for query_id in ids[first : first + queries_per_unit]})
        for first in range(0, len(ids), queries_per_unit)
    ]


def num_described(units: Sequence[WorkUnit], num_cached: int) -> int:
    """Descriptions by one actor that does the units in order, the least recently used features dropped."""
    cache: OrderedDict[int, None] = OrderedDict()
    number = 0
    for unit in units:
        for image_id in dict.fromkeys(image_id for ids in unit.candidates.values() for image_id in ids):
            number += image_id not in cache
            cache[image_id] = None
            cache.move_to_end(image_id)
            if len(cache) > num_cached:
                cache.popitem(last=False)
    return number


def nearest(queries: NDArray[np.float64], database: NDArray[np.float64]) -> dict[int, list[int]]:
    """The 100 nearest photos of each query."""
    number = min(NUM_CANDIDATES, len(database))
    return dict(enumerate(np.asarray(KDTree(database).query(queries, number)[1]).tolist()))


def toy_candidates(shuffled: bool) -> dict[int, list[int]]:
    """A toy city of 350 places, queries in the order of the benchmark or shuffled."""
    queries, database = (
        np.array([[photo.utm_east_m, photo.utm_north_m] for photo in photos])
        for photos in (toy_city.query_photos(seed=0, num_places=350), toy_city.database_photos(seed=0, num_places=350))
    )
    return _ordered(nearest(queries, database), shuffled)


def city_candidates(shuffled: bool) -> dict[int, list[int]]:
    """100,000 photos every 5 m along streets 100 m apart; drives of 50 frames every 8 m, off the photos' places."""
    generator = np.random.default_rng(0)
    along = np.arange(0, STREET_M, PHOTO_M)
    streets = np.arange(0, STREET_M, BLOCK_M)
    east_west = np.stack(np.meshgrid(along, streets), axis=-1).reshape(-1, 2)
    database = np.concatenate([east_west, east_west[:, ::-1]])
    frames = []
    for _ in range(NUM_DRIVES):
        start, street = generator.uniform(0, STREET_M - FRAMES * FRAME_M), generator.choice(streets)
        drive = np.stack([start + FRAME_M * np.arange(FRAMES), np.full(FRAMES, street)], axis=1)
        frames.append(drive if generator.random() < 0.5 else drive[:, ::-1])
    queries = np.concatenate(frames)
    return _ordered(nearest(queries + generator.normal(0, 3, queries.shape), database), shuffled)


def _ordered(candidates: dict[int, list[int]], shuffled: bool) -> dict[int, list[int]]:
    if not shuffled:
        return candidates
    return {
        int(query_id): candidates[int(query_id)] for query_id in np.random.default_rng(1).permutation(len(candidates))
    }


def table(candidates: Mapping[int, Sequence[int]]) -> str:
    """Described photos as a share of the pairs, for each unit size."""
    num_pairs = sum(map(len, candidates.values()))
    rows = []
    for size in UNIT_SIZES:
        ways = [(cut, cached) for cut in (in_query_order, work_units) for cached in (0, CACHE_PHOTOS)]
        shares = [100 * num_described(cut(candidates, size), cached) / num_pairs for cut, cached in ways]
        rows.append([f"{size}", *(f"{share:.1f}" for share in shares)])
    union = len({image_id for ids in candidates.values() for image_id in ids})
    header = ("queries in a unit", "as they come, %", "and a cache, %", "work_units, %", "and a cache, %")
    return (
        f"{len(candidates):,} queries, {num_pairs:,} pairs, {union:,} different candidates "
        f"({100 * union / num_pairs:.1f} % of the pairs: the least that is possible).\n\n"
        + shared.markdown_table(header, rows)
    )


def main() -> None:
    """Both cities, ordered and shuffled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared.add_report_option(parser, WHAT)
    options, load_at_start = parser.parse_args(), os.getloadavg()[0]
    cities: list[tuple[str, Callable[[bool], dict[int, list[int]]]]] = [
        ("Toy city, 350 places", toy_candidates),
        ("100,000 photos", city_candidates),
    ]
    sections = [
        f"## {title}, queries {'shuffled' if shuffled else 'in order'}\n\n{table(candidates(shuffled))}"
        for title, candidates in cities
        for shuffled in (False, True)
    ]
    text = "\n\n".join(sections)
    report = f"""# Units that share candidates

Photos described, as a share of the pairs scored (a query at a time without a cache describes 100 %). {NUM_CANDIDATES}
candidates of a query, the nearest by position; the cache holds {CACHE_PHOTOS} photos.

{text}

## Circumstances

{shared.circumstances(WHAT, load_at_start)}"""
    shared.publish(WHAT, report, options.report)


if __name__ == "__main__":
    main()
