"""What `model.scaled_decoding` gains when photos are decoded, and what it does to the committed small model's answers.

    python -m benchmarks.scaled_decoding --report

Run it by hand on an idle machine, from the root of the checkout; it takes some ten minutes on two cores.

- **Decoding**: JPEG photos of a toy city, drawn in three sizes, become the network's pixels (`images.decode`, bytes
  already in memory; one thread, of which the CPU time counts), for a small network's side and for that of the
  published ones. Rounds alternate: whole, scaled, scaled with sides at least 1 x the network's, whole, ... The last way
  is no setting: it shows what the factor (`images.SCALED_SIDES`) is worth.
- **Descriptors** of the same photos: the cosine distance of those of a scaled photo to those of the whole one.
- **Recall**: recall@1 of the global descriptor on a toy city of 640 x 480, all photos whole, all scaled, and queries
  scaled against an index of whole ones, which a run refuses, with 95 % percentile bootstraps over the queries.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks import shared
from pairvpr.config.compose import load
from pairvpr.config.schema import EvaluateConfig
from pairvpr.data import images
from pairvpr.data.benchmarks import load_benchmark
from pairvpr.distributed.progress import say
from pairvpr.evaluation.bootstrap import bootstrap_interval
from pairvpr.index.search import Shard, flat_index, search
from pairvpr.models.weights import build_model, load_weights
from pairvpr.retrieval import pipeline
from pairvpr.retrieval.describe import Describer
from pairvpr.toy import city as toy_city

WHAT = "scaled_decoding"
SIZES = ((640, 480), (1600, 1200), (3264, 2448))
PUBLISHED_SIDE_PX = 322
NUM_THREADS = 2
SEED = 5
WAYS = {"whole": None, f"scaled, {images.SCALED_SIDES} x": images.SCALED_SIDES, "scaled, 1 x": 1}
"""Ways to decode, and how many times the network's side is left at least."""


@dataclass(frozen=True)
class Decoded:
    """Photos of one size for one network: photos per CPU second of each round, and pixels (n, S, S, 3), by way."""

    size: tuple[int, int]
    side_px: int
    rates: dict[str, list[float]]
    pixels: dict[str, NDArray[np.uint8]]

    def rate(self, way: str) -> float:
        """The median of the rounds."""
        return statistics.median(self.rates[way])


def draw(number: int, size: tuple[int, int]) -> list[bytes]:
    """JPEG photos of a toy city."""
    width_px, height_px = size
    places = -(-number // len(toy_city.DATABASE_DAYS))
    drawn = []
    for photo in toy_city.database_photos(seed=SEED, num_places=places)[:number]:
        sink = io.BytesIO()
        image = toy_city.draw(photo, width_px=width_px, height_px=height_px)
        image.save(sink, "JPEG", quality=shared.JPEG_QUALITY)
        drawn.append(sink.getvalue())
    return drawn


def decode(photos: Sequence[bytes], side_px: int, way: str) -> NDArray[np.uint8]:
    """(n, S, S, 3) uint8, by one of `WAYS`."""
    sides = WAYS[way]
    with patch.object(images, "SCALED_SIDES", sides):
        return np.stack([images.decode(data, side_px, scaled_decoding=sides is not None) for data in photos])


def measure(photos: Sequence[bytes], size: tuple[int, int], side_px: int, num_rounds: int) -> Decoded:
    """All ways, one after another, round after round; what a first round teaches the caches is not counted."""
    pixels = {way: decode(photos, side_px, way) for way in WAYS}
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(num_rounds):
        for way in WAYS:
            started_s = time.process_time()
            decode(photos, side_px, way)
            rates[way].append(len(photos) / (time.process_time() - started_s))
    decoded = Decoded(size, side_px, rates, pixels)
    say(f"{_name(size)} for {side_px} px: " + ", ".join(f"{way} {decoded.rate(way):.1f} photos/s" for way in WAYS))
    return decoded


def decoding_rows(decoded: Sequence[Decoded]) -> list[list[str]]:
    """Medians, and how many times as fast as whole photos."""
    return [
        [_name(one.size), f"{one.side_px}", _scale(one.size, one.side_px, images.SCALED_SIDES)]
        + [f"{one.rate(way):,.1f}" for way in WAYS]
        + [f"{one.rate(way) / one.rate('whole'):.2f}" for way in list(WAYS)[1:]]
        for one in decoded
    ]


def descriptor_rows(decoded: Sequence[Decoded], describer: Describer) -> list[list[str]]:
    """Cosine distances to the descriptors of whole photos, mean and largest, for photos of the small model's side."""
    rows = []
    for one in decoded:
        if one.side_px != describer.model.config.image_size_px:
            continue
        found = {way: describer.descriptors(pixels).astype(np.float64) for way, pixels in one.pixels.items()}
        cells = []
        for way in list(WAYS)[1:]:
            distances = 1 - (found[way] * found["whole"]).sum(axis=1)
            cells += [f"{distances.mean():.1e}", f"{distances.max():.1e}"]
        others = found["whole"] @ found["whole"].T
        apart = 1 - others[np.triu_indices(len(others), 1)]
        rows.append([_name(one.size), f"{len(others)}", *cells, f"{np.median(apart):.2f}"])
    return rows


def recall_rows(folder: Path, num_places: int, describer: Describer) -> list[list[str]]:
    """recall@1 with the option off, on, and on for queries alone; and how many first answers changed."""
    for part, photos in (
        ("database", toy_city.database_photos(seed=SEED, num_places=num_places)),
        ("queries", toy_city.query_photos(seed=SEED, num_places=num_places)),
    ):
        (folder / part).mkdir()
        for photo in photos:
            image = toy_city.draw(photo, width_px=shared.WIDTH_PX, height_px=shared.HEIGHT_PX)
            image.save(folder / part / photo.path, quality=shared.JPEG_QUALITY)
    line = ["benchmark=folders", f"benchmark.database={folder}/database", f"benchmark.queries={folder}/queries"]
    whole = load(EvaluateConfig, [*line, f"output={folder}/out", "benchmark.radius_m=25", "describe.batch_size=32"])
    scaled = replace(whole, model=replace(whole.model, scaled_decoding=True))
    benchmark = load_benchmark(whole.benchmark, whole.output)
    positives = benchmark.positives
    assert positives is not None
    first, rows = None, []
    for name, of_database, of_queries in (
        ("all whole", whole, whole),
        ("all scaled", scaled, scaled),
        ("queries scaled, database whole", whole, scaled),
    ):
        database = pipeline.describe(benchmark.database, describer, of_database.describe)
        queries = pipeline.describe(benchmark.queries, describer, of_queries.describe)
        shard = Shard(flat_index(database.descriptors), database.ids)
        answers = search(shard, queries.descriptors, 1, num_threads=NUM_THREADS)[1][:, 0]
        first = answers if first is None else first
        hits = np.array([answer in ids for answer, ids in zip(answers, positives, strict=True)], np.float64)
        rows.append([name, f"{len(hits):,}", bootstrap_interval(hits).percent(), f"{(answers != first).sum():,}"])
        say(f"{name}: recall@1 {rows[-1][2]}")
    return rows


def _name(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _scale(size: tuple[int, int], side_px: int, sides: int) -> str:
    """What libjpeg is asked for."""
    with Image.new("RGB", size) as image, io.BytesIO() as sink:
        image.save(sink, "JPEG")
        with Image.open(sink) as photo:
            photo.draft(None, (sides * side_px, sides * side_px))
            return f"1/{round(size[0] / photo.width)}" if photo.width < size[0] else "whole"


def report(
    decoded: Sequence[Decoded], describer: Describer, recalls: Sequence[Sequence[str]], load_at_start: float
) -> str:
    """All tables as Markdown."""
    scaled = list(WAYS)[1:]
    decoding = shared.markdown_table(
        ("photos", "network's side, px", "scale", *WAYS, *(f"{way} / whole" for way in scaled)), decoding_rows(decoded)
    )
    cosine = [f"{way}, {what}" for way in scaled for what in ("mean", "largest")]
    descriptors = shared.markdown_table(
        ("photos", "number", *cosine, "two photos, median"), descriptor_rows(decoded, describer)
    )
    recall = shared.markdown_table(("photos", "queries", "recall@1, %", "other first answers"), recalls)
    rounds, small_px = len(decoded[0].rates["whole"]), describer.model.config.image_size_px
    return f"""# Scaled decoding of JPEGs

Photos that one thread decodes and resizes in a second of CPU time: JPEG photos of a toy city (quality
{shared.JPEG_QUALITY}), bytes in memory, medians of {rounds} alternating rounds. `scale` is that of
`model.scaled_decoding`, which leaves both sides at least {images.SCALED_SIDES} x the network's; with 1 x it would be
another one.

{decoding}

Cosine distance of a scaled photo's global descriptor to the whole photo's (the committed small model, {small_px} px),
and for comparison the median distance of two different photos:

{descriptors}

recall@1 of the global descriptor in percent with 95 % bootstrap intervals over the queries, small model, photos of
{shared.WIDTH_PX} x {shared.HEIGHT_PX}; the last row is what a run refuses:

{recall}

{shared.circumstances(WHAT, load_at_start)}"""


def main() -> None:
    """All sizes for both networks, then descriptors and recall."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each way to decode (5)")
    parser.add_argument("--photos", type=int, default=24, help="photos of each size (24)")
    parser.add_argument("--places", type=int, default=200, help="places, and queries, of the city (200)")
    shared.add_report_option(parser, WHAT)
    options = parser.parse_args()
    if min(options.rounds, options.photos - 1, options.places) < 1:
        parser.error("expected at least one round, two photos and one place")
    load_at_start = os.getloadavg()[0]
    torch.set_num_threads(NUM_THREADS)
    config = load(EvaluateConfig, ["output=unused", "benchmark=toy_city"])
    describer = Describer(build_model(config.model, load_weights(config.model), torch.device("cpu")))
    decoded = []
    for size in SIZES:
        say(f"drawing {options.photos} photos of {_name(size)}")
        photos = draw(options.photos, size)
        for side_px in (config.model.image_size_px, PUBLISHED_SIDE_PX):
            decoded.append(measure(photos, size, side_px, options.rounds))
    with tempfile.TemporaryDirectory() as folder:
        say("drawing the city")
        recalls = recall_rows(Path(folder), options.places, describer)
    shared.publish(WHAT, report(decoded, describer, recalls, load_at_start), options.report)


if __name__ == "__main__":
    main()
