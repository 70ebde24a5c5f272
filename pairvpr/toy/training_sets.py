"""Miniatures of the training sets, in the layouts of their downloads, drawn from the toy city.

Their streets are of seeds from `FIRST_SEED` on, and benchmarks take smaller ones: what is trained on is never tested
on. The same arguments draw the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from pairvpr.data import panoramas, storage
from pairvpr.data.training_sets import gsv_cities, landmarks
from pairvpr.errors import UserError
from pairvpr.toy import city as toy_city
from pairvpr.toy.city import Photo

FIRST_SEED = 1000
JPEG_QUALITY = 85
WIDTH_PX, HEIGHT_PX = 160, 120

_FIRST_YEAR, _MONTHS = 2010, 12
_LAT_DEG, _LON_DEG, _M_PER_LAT_DEG, _M_PER_LON_DEG = 40.0, -3.0, 111_320.0, 85_000.0

# SF-XL: a cell is a square court with eight house fronts around it, each a stretch of street of its own.
_NUM_FRONTS = 8
_FRONT_DEG = 360.0 / _NUM_FRONTS
_FRONT_ZOOM = 1.947  # a photo of zoom 1 is 78 degrees wide; this one `_FRONT_DEG`
_FRONT_SPACING_M = 1000.0
_MAX_OFFSET_M = 2.5
_CELL_SPACING_M = 2 * panoramas.CELL_SIZE_M
_CELLS_PER_ROW = 100
_FIRST_CELL_M = (544_995, 4_176_990)  # multiples of the cell's size
_ENLARGED = 2  # fronts are drawn at a fraction of the panorama's resolution


def write_gsv_cities(
    root: str,
    seed: int = 1000,
    num_places: int = 20,
    photos_per_place: int = 4,
    cities: Sequence[str] = ("Bangkok", "Boston"),
    width_px: int = WIDTH_PX,
    height_px: int = HEIGHT_PX,
) -> None:
    """GSV-Cities below `root`: `num_places` in each city, whose streets are of seeds `seed`, `seed` + 1, ...

    Raises `UserError` for a city that GSV-Cities does not have, or a seed below `FIRST_SEED`.
    """
    _check_seed(seed)
    unknown = [city for city in cities if city not in gsv_cities.CITIES]
    if unknown:
        raise UserError(f"no city {', '.join(unknown)} in GSV-Cities; expected some of {', '.join(gsv_cities.CITIES)}")
    for city_seed, city in enumerate(cities, seed):
        lines = [",".join([*gsv_cities.COLUMNS, "city_id"])]
        for photo in _photos(city_seed, num_places, photos_per_place):
            row = _gsv_row(photo)
            lines.append(",".join(map(str, [*row.values(), city])))
            path = gsv_cities.photo_path(city, **row)
            write_jpeg(storage.join(root, path), toy_city.draw(photo, width_px=width_px, height_px=height_px))
        write_lines(storage.join(root, "Dataframes", f"{city}.csv"), lines)


def write_landmarks(
    root: str,
    seed: int = 3000,
    num_places: int = 20,
    photos_per_place: int = 4,
    width_px: int = WIDTH_PX,
    height_px: int = HEIGHT_PX,
) -> None:
    """Google Landmarks v2 below `root`. Raises `UserError` for a seed below `FIRST_SEED`."""
    _check_seed(seed)
    ids_of_place: list[list[str]] = [[] for _ in range(num_places)]
    for photo in _photos(seed, num_places, photos_per_place):
        image_id = hashlib.sha256(photo.path.encode()).hexdigest()[:16]
        ids_of_place[photo.place].append(image_id)
        image = toy_city.draw(photo, width_px=width_px, height_px=height_px)
        write_jpeg(storage.join(root, landmarks.photo_path(image_id)), image)
    rows = [f"{place},{' '.join(ids)}" for place, ids in enumerate(ids_of_place)]
    write_lines(storage.join(root, landmarks.CSV_NAME), [",".join(landmarks.COLUMNS), *rows])


def write_sfxl(root: str, seed: int = 2000, num_places: int = 8, panoramas_per_place: int = 5) -> None:
    """SF-XL below `root`: one cell per place. Raises `UserError` for a seed below `FIRST_SEED`."""
    _check_seed(seed)
    for photo in _photos(seed, num_places, 1):
        for index in range(panoramas_per_place):
            rng = np.random.default_rng((seed, photo.place, index))
            east_m, north_m = rng.uniform(-_MAX_OFFSET_M, _MAX_OFFSET_M, 2).round(2).tolist()
            yaw_deg = int(rng.integers(360))
            path = _panorama_path(photo, index, east_m, north_m, yaw_deg)
            write_jpeg(storage.join(root, path), _draw_panorama(photo, index, east_m, north_m, yaw_deg))


def _check_seed(seed: int) -> None:
    if seed < FIRST_SEED:
        raise UserError(
            f"seed {seed}: expected {FIRST_SEED} or more, because benchmarks show the streets of smaller ones"
        )


def _photos(seed: int, num_places: int, photos_per_place: int) -> list[Photo]:
    """Each photo of a place is of a day of its own."""
    days = range(photos_per_place)
    return toy_city.photos(seed=seed, num_places=num_places, photos_per_place=photos_per_place, days=days)


def _gsv_row(photo: Photo) -> dict[str, Any]:
    """The columns of `gsv_cities.COLUMNS`."""
    lat_deg, lon_deg = lat_lon_deg(photo)
    return {
        "place_id": photo.place,
        "year": _FIRST_YEAR + photo.day // _MONTHS,
        "month": 1 + photo.day % _MONTHS,
        "northdeg": round(photo.heading_deg) % 360,
        "lat": lat_deg,
        "lon": lon_deg,
        "panoid": f"toy-{photo.seed}_{photo.place}_{photo.index}",
    }


def lat_lon_deg(photo: Photo) -> tuple[float, float]:
    """Made-up degrees, different for every place."""
    lat_deg = _LAT_DEG + photo.utm_north_m % 10_000 / _M_PER_LAT_DEG
    lon_deg = _LON_DEG + photo.utm_east_m % 10_000 / _M_PER_LON_DEG
    return round(lat_deg, 7), round(lon_deg, 7)


def _panorama_path(photo: Photo, index: int, east_m: float, north_m: float, yaw_deg: int) -> str:
    """Path below the set's root of a panorama (east, north) metres from the middle of its place's cell."""
    row, column = divmod(photo.place, _CELLS_PER_ROW)
    middle_m = panoramas.CELL_SIZE_M / 2
    utm_east_m = _FIRST_CELL_M[0] + column * _CELL_SPACING_M + middle_m + east_m
    utm_north_m = _FIRST_CELL_M[1] + row * _CELL_SPACING_M + middle_m + north_m
    panorama_id = f"toy{photo.seed:06d}p{photo.place:06d}i{index:06d}"
    name = f"@{utm_east_m:010.2f}@{utm_north_m:010.2f}@10@S@@@{panorama_id}@@{yaw_deg}@@@@201311@@.jpg"
    return f"panoramas/{photo.place // _CELLS_PER_ROW:02d}/{name}"


def _draw_panorama(photo: Photo, index: int, east_m: float, north_m: float, yaw_deg: int) -> Image.Image:
    """The fronts around a place, seen (east, north) metres from its middle; the middle column looks along the yaw."""
    width_px, height_px = panoramas.WIDTH_PX // _ENLARGED, panoramas.HEIGHT_PX // _ENLARGED
    strip = Image.new("RGB", (width_px, height_px))
    front_width_px = width_px // _NUM_FRONTS
    for front in range(_NUM_FRONTS):
        heading_rad = np.deg2rad(front * _FRONT_DEG)
        right_m = east_m * np.cos(heading_rad) - north_m * np.sin(heading_rad)
        ahead_m = east_m * np.sin(heading_rad) + north_m * np.cos(heading_rad)
        seen = replace(
            photo,
            day=index,
            index=index * _NUM_FRONTS + front,
            utm_east_m=photo.utm_east_m + front * _FRONT_SPACING_M + right_m,
            utm_north_m=photo.utm_north_m + ahead_m,
            heading_deg=0.0,
            zoom=_FRONT_ZOOM,
        )
        drawn = toy_city.draw(seen, width_px=front_width_px, height_px=height_px)
        strip.paste(drawn, (front * front_width_px, 0))
    first_deg = yaw_deg - 180.0 + _FRONT_DEG / 2  # from the west end of the front that looks north
    turned = np.roll(np.asarray(strip), -round(first_deg / 360.0 * width_px), axis=1)
    return Image.fromarray(turned).resize((panoramas.WIDTH_PX, panoramas.HEIGHT_PX), Image.Resampling.BILINEAR)


def write_jpeg(url: str, image: Image.Image) -> None:
    """Publish a drawn photo."""
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=JPEG_QUALITY)
    storage.write_bytes(url, sink.getvalue())


def write_lines(url: str, lines: Sequence[str]) -> None:
    """Publish a table as text."""
    storage.write_bytes(url, "".join(f"{line}\n" for line in lines).encode())


def _write_city(root: str, seed: int, city: str, num_places: int, photos_per_place: int) -> None:
    write_gsv_cities(root, seed, num_places, photos_per_place, (city,))


def main() -> None:
    """Draw GSV-Cities in miniature, all of its cities, on every core."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("root", help="folder to write gsv_cities/ into")
    parser.add_argument("--places", type=int, default=120, help="places of each city (120)")
    parser.add_argument("--photos", type=int, default=6, help="photos of each place (6)")
    options = parser.parse_args()
    root = storage.join(options.root, "gsv_cities")
    with ProcessPoolExecutor() as pool:
        drawn = [
            pool.submit(_write_city, root, FIRST_SEED + i, city, options.places, options.photos)
            for i, city in enumerate(gsv_cities.CITIES)
        ]
        for result in drawn:
            result.result()


if __name__ == "__main__":
    main()
