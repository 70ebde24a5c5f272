"""Layout `toy_city`: photos that `pairvpr.toy.city` draws, positives within a radius."""

from __future__ import annotations

import io

import numpy as np

from pairvpr.config.benchmark_schema import ToyCityConfig
from pairvpr.data import storage
from pairvpr.data.manifest import Benchmark, Manifest
from pairvpr.data.positives import within_radius
from pairvpr.toy import city

JPEG_QUALITY = 90
WIDTH_PX, HEIGHT_PX = 160, 120


def load(config: ToyCityConfig, output: str) -> Benchmark:
    """The city's benchmark; names and positions are known before a photo is drawn."""
    database, queries = (
        Manifest.of(
            storage.join(_directory(output), part),
            [photo.path for photo in photos],
            np.array([[photo.utm_east_m, photo.utm_north_m] for photo in photos]),
            np.array([photo.heading_deg for photo in photos]),
        )
        for part, photos in _photos(config).items()
    )
    return Benchmark(
        name=config.name,
        database=database,
        queries=queries,
        positives=within_radius(queries.utm_m, database.utm_m, config.radius_m),
        protocol={"positives": "radius", "radius_m": config.radius_m},
    )


def draw_photos(config: ToyCityConfig, output: str) -> None:
    """Draw what is not drawn yet, as JPEG files; each appears whole or not at all."""
    directory = _directory(output)
    existing = set(storage.list_files(directory))
    for part, photos in _photos(config).items():
        for photo in photos:
            if f"{part}/{photo.path}" in existing:
                continue
            sink = io.BytesIO()
            image = city.draw(photo, width_px=WIDTH_PX, height_px=HEIGHT_PX)
            image.save(sink, "JPEG", quality=JPEG_QUALITY)
            storage.write_bytes(storage.join(directory, part, photo.path), sink.getvalue())


def _directory(output: str) -> str:
    return storage.join(storage.absolute(output), "photos")


def _photos(config: ToyCityConfig) -> dict[str, list[city.Photo]]:
    return {
        "database": city.database_photos(
            seed=config.seed, num_places=config.num_places, photos_per_place=config.photos_per_place
        ),
        "queries": city.query_photos(
            seed=config.seed, num_places=config.num_places, photos_per_place=config.queries_per_place
        ),
    }
