"""GSV-Cities: street-level photos of 23 cities, several years of each place.

Layout: `Dataframes/<City>.csv` lists the photos of a city, `Images/<City>/` holds them under names made of its columns.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.random import Generator
from numpy.typing import NDArray

from pairvpr.data import storage
from pairvpr.data.training_sets.base import View
from pairvpr.data.training_sets.places import digest, draw_photos, group, offsets_of
from pairvpr.data.training_sets.tables import read_csv
from pairvpr.errors import UserError

MIN_PHOTOS = 4
CITIES = (
    "Bangkok",
    "BuenosAires",
    "LosAngeles",
    "MexicoCity",
    "OSL",
    "Rome",
    "Barcelona",
    "Chicago",
    "Madrid",
    "Miami",
    "Phoenix",
    "TRT",
    "Boston",
    "Lisbon",
    "Medellin",
    "Minneapolis",
    "PRG",
    "WashingtonDC",
    "Brussels",
    "London",
    "Melbourne",
    "Osaka",
    "PRS",
)
COLUMNS = {
    "place_id": pa.int64(),
    "year": pa.int64(),
    "month": pa.int64(),
    "northdeg": pa.int64(),
    "lat": pa.float64(),
    "lon": pa.float64(),
    "panoid": pa.string(),
}


def photo_path(
    city: str, place_id: int, year: int, month: int, northdeg: int, lat: float, lon: float, panoid: str
) -> str:
    """Path of a photo below the set's root, built from its row in the city's CSV file."""
    name = f"{city}_{place_id:07d}_{year:04d}_{month:02d}_{northdeg:03d}_{lat}_{lon}_{panoid}.jpg"
    return f"Images/{city}/{name}"


@dataclass(frozen=True, eq=False)
class GsvCities:
    """Places city by city, in the order of their ids, which are unique only within a city.

    `photos` has the columns of `COLUMNS` and `city`; place i is the rows from `offsets[i]` to `offsets[i + 1]` - 1.
    """

    root: str
    photos: pa.Table
    offsets: NDArray[np.int64]
    cities: list[tuple[str, range]]  # a city's name and its places; cities without a place are left out

    @property
    def name(self) -> str:
        """As in `train.datasets`."""
        return "gsv_cities"

    def __len__(self) -> int:
        """Number of places."""
        return len(self.offsets) - 1

    @property
    def places_sha256(self) -> str:
        """See `TrainingSet.places_sha256`."""
        return self._places_sha256

    @cached_property
    def _places_sha256(self) -> str:
        columns = [self.photos.column(name) for name in ("city", *COLUMNS)]
        return digest(self.offsets, *(its if pa.types.is_string(its.type) else its.to_numpy() for its in columns))

    def draw(self, place: int, count: int, rng: Generator, broken: Collection[str] = ()) -> list[View]:
        """`count` different photos of a place, drawn uniformly, without those in `broken`."""
        first, end = self.offsets[place : place + 2].tolist()
        return draw_photos(end - first, lambda photo: self._url(first + photo), count, rng, broken)

    def _url(self, row: int) -> str:
        (photo,) = self.photos.slice(row, 1).to_pylist()
        return storage.join(self.root, photo_path(**photo))


def read_gsv_cities(root: str) -> GsvCities:
    """The cities with CSV files below `root`; places with at least `MIN_PHOTOS` photos.

    Raises `UserError`, naming the file, folder or column, if the layout differs or there is no place.
    """
    root = storage.absolute(root)
    dataframes = storage.join(root, "Dataframes")
    try:
        present = set(storage.list_files(dataframes))
    except OSError as error:
        raise UserError(f"{dataframes}: can't be read: {storage.reason(error)}") from error
    tables: list[pa.Table] = []
    counts: list[NDArray[np.int64]] = []
    cities: list[tuple[str, range]] = []
    num_places = 0
    for city in CITIES:
        if f"{city}.csv" in present:
            photos, photos_per_place = _read_city(root, city)
            tables.append(photos)
            counts.append(photos_per_place)
            if len(photos_per_place):
                cities.append((city, range(num_places, num_places + len(photos_per_place))))
            num_places += len(photos_per_place)
    if not tables:
        raise UserError(f"{dataframes}: no CSV file of a city; expected <City>.csv for some of {', '.join(CITIES)}")
    if not num_places:
        raise UserError(f"{dataframes}: no place with at least {MIN_PHOTOS} photos in {len(tables)} CSV files")
    return GsvCities(root, pa.concat_tables(tables).combine_chunks(), offsets_of(np.concatenate(counts)), cities)


def _read_city(root: str, city: str) -> tuple[pa.Table, NDArray[np.int64]]:
    """Photos of a city's places, place by place, and the number of each place's photos."""
    table = read_csv(storage.join(root, "Dataframes", f"{city}.csv"), COLUMNS)
    images = storage.join(root, "Images", city)
    if not storage.exists(images):
        raise UserError(f"{images}: no such folder; expected the photos that Dataframes/{city}.csv lists")
    places = group(table.column("place_id").to_numpy(), MIN_PHOTOS)
    photos = table.take(pa.array(places.rows))
    return photos.append_column("city", pa.array([city] * len(photos), pa.string())), np.diff(places.offsets)
