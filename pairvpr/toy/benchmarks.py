"""Miniatures of the public benchmarks, in the layouts of their downloads, drawn from the toy city.

    python -m pairvpr.toy.benchmarks DIR

writes all of them below DIR, which then is a `datasets_root`. The same arguments draw the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from scipy.io import savemat

from pairvpr.data import storage
from pairvpr.data.benchmarks.nordland import FRAME_SPACING_M
from pairvpr.data.benchmarks.pittsburgh import QUERIES_FOLDER
from pairvpr.errors import UserError
from pairvpr.toy import city as toy_city
from pairvpr.toy.city import Photo
from pairvpr.toy.training_sets import FIRST_SEED, HEIGHT_PX, WIDTH_PX, lat_lon_deg, write_jpeg, write_lines

MSLS_CITIES = {
    "train_val": ("cph", "sf"),
    "test": ("miami", "athens", "buenosaires", "stockholm", "bengaluru", "kampala"),
}
SFXL_QUERIES = ("queries_v1", "queries_v2", "queries_night", "queries_occlusion")
SVOX_QUERIES = ("queries", "queries_night", "queries_overcast", "queries_rain", "queries_snow", "queries_sun")
PLAIN_NAMES = ("st_lucia", "amstertime", "eynsham", "sped")

_SUBTASKS = ("all", "s2w", "w2s", "o2n", "n2o", "d2n", "n2d")
_DAYS = (*toy_city.DATABASE_DAYS, *toy_city.QUERY_DAYS)
_FRAME_M = 12.0  # on the ground, between two frames of the toy railway


def write_benchmarks(root: str, seed: int = 0, num_places: int = 4) -> None:
    """Every public benchmark below `root`, so that `datasets_root=ROOT` finds it.

    Raises `UserError` for a seed of the training sets.
    """
    _check_seed(seed + len(MSLS_CITIES["test"]))
    write_msls(storage.join(root, "msls"), seed, num_places)
    write_nordland(storage.join(root, "nordland"), seed)
    write_nordland_with_names(storage.join(root, "nordland"), seed)
    write_pittsburgh(storage.join(root, "pittsburgh"), seed, num_places)
    write_sfxl_test(storage.join(root, "sf_xl"), seed, num_places)
    write_tokyo(storage.join(root, "tokyo247"), seed, num_places)
    images = {name: storage.join(root, name, "images", "test") for name in ("svox", *PLAIN_NAMES)}
    write_named(images["svox"], seed, num_places, database="gallery", queries=SVOX_QUERIES)
    for name in PLAIN_NAMES:
        write_named(images[name], seed, num_places)


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A photo of an MSLS city and what its tables say of it."""

    photo: Photo
    subtasks: frozenset[str] = frozenset(_SUBTASKS)
    night: bool = False
    pano: bool = False

    @property
    def key(self) -> str:
        return hashlib.sha256(self.photo.path.encode()).hexdigest()[:22]


def write_msls(root: str, seed: int = 0, num_places: int = 4, *, test_has_positions: bool = False) -> None:
    """MSLS below `root`; its cities, of seeds `seed`, `seed` + 1, ..., stand on the same ground.

    With `test_has_positions`, the test cities have the tables of positions that their owners published in 2026.

    Each city has two database photos and a query of each place, a panorama in either part, and further queries: one
    at a place without database photos, and one that is in no subtask. By night are the queries of places 0 and 1; d2n
    holds these and the first database photo of each place, every other subtask the whole of `all`. Raises `UserError`
    for a seed of the training sets.
    """
    for split, cities in MSLS_CITIES.items():
        for city_seed, city in enumerate(cities, seed):
            _check_seed(city_seed)
            for part, rows in (
                ("database", _msls_database(city_seed, num_places)),
                ("query", _msls_queries(city_seed, num_places)),
            ):
                kept = [row for row in rows if split == "train_val" or not row.pano]
                has_positions = test_has_positions or split == "train_val"
                _write_msls_part(storage.join(root, split, city, part), kept, with_positions=has_positions)


def _msls_database(seed: int, num_places: int) -> list[_Row]:
    photos = toy_city.photos(seed=seed, num_places=num_places, photos_per_place=3, days=_DAYS)
    by_index = {0: frozenset(_SUBTASKS), 1: frozenset(_SUBTASKS) - {"d2n"}}
    rows = [_Row(photo=photo, subtasks=by_index[photo.index]) for photo in photos if photo.index < 2]
    panorama = next(photo for photo in photos if photo.place == 0 and photo.index == 2)
    return [_Row(photo=panorama, pano=True), *rows]


def _msls_queries(seed: int, num_places: int) -> list[_Row]:
    by_day = frozenset(_SUBTASKS) - {"d2n"}
    photos = toy_city.photos(seed=seed, num_places=num_places + 1, photos_per_place=3, days=toy_city.QUERY_DAYS)
    first = {photo.place: photo for photo in photos if photo.index == 0}
    extra, panorama = (next(photo for photo in photos if photo.place == 0 and photo.index == i) for i in (1, 2))
    rows = [
        _Row(photo=photo, night=place < 2, subtasks=by_day | {"d2n"} if place < 2 else by_day)
        for place, photo in first.items()
    ]
    return [_Row(photo=extra, subtasks=frozenset()), *rows, _Row(photo=panorama, pano=True)]


def _write_msls_part(folder: str, rows: Sequence[_Row], *, with_positions: bool) -> None:
    for row in rows:
        write_jpeg(storage.join(folder, "images", f"{row.key}.jpg"), _drawn(row.photo))
    tables = {
        "seq_info": ["key,sequence_key,frame_number"]
        + [f"{row.key},toy-{row.photo.day},{i}" for i, row in enumerate(rows)],
        "subtask_index": [",".join(_SUBTASKS)]
        + [",".join(str(name in row.subtasks) for name in _SUBTASKS) for row in rows],
    }
    if with_positions:
        tables["raw"] = ["key,lon,lat,ca,captured_at,pano", *map(_raw_row, rows)]
        tables["postprocessed"] = [
            "key,easting,northing,unique_cluster,control_panel,night,view_direction",
            *map(_postprocessed_row, rows),
        ]
    for name, (header, *lines) in tables.items():
        numbered = [f",{header}", *(f"{i},{line}" for i, line in enumerate(lines))]
        write_lines(storage.join(folder, f"{name}.csv"), numbered)


def _raw_row(row: _Row) -> str:
    lat_deg, lon_deg = lat_lon_deg(row.photo)
    return f"{row.key},{lon_deg},{lat_deg},{row.photo.heading_deg},2019-01-{1 + row.photo.day % 28:02d},{row.pano}"


def _postprocessed_row(row: _Row) -> str:
    photo = row.photo
    return f"{row.key},{photo.utm_east_m},{photo.utm_north_m},{photo.place},False,{row.night},Forward"


def write_nordland(root: str, seed: int = 0, num_queries: int = 3) -> None:
    """`ref/` and `query/` below `root`: every tenth frame is asked, the last reference frame is the one after it."""
    _check_seed(seed)
    for number in range(10 * (num_queries - 1) + 2):
        write_jpeg(storage.join(root, "ref", f"{number:07d}.jpg"), _drawn(_frame(seed, number, _DAYS[0])))
    for number in range(num_queries):
        write_jpeg(storage.join(root, "query", f"{number:07d}.jpg"), _drawn(_frame(seed, 10 * number, _DAYS[-1])))


def write_nordland_with_names(root: str, seed: int = 0, num_frames: int = 24) -> None:
    """`images/test/{database,queries}` below `root`: every frame is asked, names are made-up positions."""
    _check_seed(seed)
    for part, day in (("database", _DAYS[0]), ("queries", _DAYS[-1])):
        for number in range(num_frames):
            north_m = int(100 * number * FRAME_SPACING_M) / 100  # cut, not rounded
            name = f"@{0:010.2f}@{north_m:010.2f}@@@@@{number:05d}@@@@@@@@.jpg"
            write_jpeg(storage.join(root, "images", "test", part, name), _drawn(_frame(seed, number, day)))


def _frame(seed: int, number: int, day: int) -> Photo:
    """The view from a railway that runs along the first street."""
    (first,) = toy_city.photos(seed=seed, num_places=1, photos_per_place=1, days=[day])
    return replace(first, index=number, utm_east_m=first.utm_east_m + number * _FRAME_M, heading_deg=0.0, zoom=1.0)


def write_pittsburgh(root: str, seed: int = 0, num_places: int = 4) -> None:
    """Pittsburgh below `root`: the 30k lists hold `num_places` places each, validation first, the 250k list both."""
    _check_seed(seed)
    database = toy_city.database_photos(seed=seed, num_places=2 * num_places, photos_per_place=2)
    queries = toy_city.query_photos(seed=seed, num_places=2 * num_places)
    files = {photo: _pittsburgh_name(i) for photos in (database, queries) for i, photo in enumerate(photos)}
    for photo in database:
        write_jpeg(storage.join(root, files[photo]), _drawn(photo))
    for photo in queries:
        write_jpeg(storage.join(root, QUERIES_FOLDER, files[photo]), _drawn(photo))
    lists = {
        "pitts30k_val": range(num_places),
        "pitts30k_test": range(num_places, 2 * num_places),
        "pitts250k_test": range(2 * num_places),
    }
    for name, places in lists.items():
        listed = [{files[photo]: photo for photo in photos if photo.place in places} for photos in (database, queries)]
        write_db_struct(storage.join(root, "datasets", f"{name}.mat"), name, *map(_positions, listed))


def _pittsburgh_name(number: int) -> str:
    photo, view = divmod(number, 24)
    return f"{photo // 1000:03d}/{photo:06d}_pitch{1 + view // 12}_yaw{1 + view % 12}.jpg"


def _positions(photos: Mapping[str, Photo]) -> dict[str, tuple[float, float]]:
    return {name: (photo.utm_east_m, photo.utm_north_m) for name, photo in photos.items()}


def write_db_struct(
    url: str,
    name: str,
    database: Mapping[str, tuple[float, float]],
    queries: Mapping[str, tuple[float, float]],
) -> None:
    """A MATLAB file with `dbStruct`: UTM east, north in metres of photos by name."""
    sink = io.BytesIO()
    fields = {
        "whichSet": name.partition("_")[2],
        "dbImageFns": _cells(list(database)),
        "utmDb": np.array(list(database.values()), np.float64).T,
        "qImageFns": _cells(list(queries)),
        "utmQ": np.array(list(queries.values()), np.float64).T,
        "numImages": float(len(database)),
        "numQueries": float(len(queries)),
        "posDistThr": 25.0,
        "posDistSqThr": 625.0,
        "nonTrivPosDistSqThr": 100.0,
    }
    savemat(sink, {"dbStruct": fields})
    storage.write_bytes(url, sink.getvalue())


def _cells(names: Sequence[str]) -> np.ndarray:
    """A MATLAB cell array, one name in each row."""
    cells = np.empty((len(names), 1), object)
    cells[:, 0] = names
    return cells


def write_sfxl_test(root: str, seed: int = 0, num_places: int = 4) -> None:
    """`test/` of SF-XL below `root`: one database, four folders of queries."""
    write_named(storage.join(root, "test"), seed, num_places, queries=SFXL_QUERIES)


def write_tokyo(root: str, seed: int = 0, num_places: int = 4) -> None:
    """Tokyo 24/7 below `root`; the database's photos of one place lie in several folders."""
    _check_seed(seed)
    test = storage.join(root, "images", "test")
    for photo in toy_city.database_photos(seed=seed, num_places=num_places):
        write_jpeg(storage.join(test, "database", f"{3800 + photo.index:05d}", photo.path), _drawn(photo))
    for photo in toy_city.query_photos(seed=seed, num_places=num_places):
        write_jpeg(storage.join(test, "queries", photo.path), _drawn(photo))


def write_named(
    root: str, seed: int = 0, num_places: int = 4, *, database: str = "database", queries: Sequence[str] = ("queries",)
) -> None:
    """Folders of `@`-named photos below `root`: two of each place in the database, one in each folder of queries."""
    _check_seed(seed)
    for photo in toy_city.database_photos(seed=seed, num_places=num_places, photos_per_place=2):
        write_jpeg(storage.join(root, database, photo.path), _drawn(photo))
    for day, folder in enumerate(queries, toy_city.QUERY_DAYS[0]):
        for photo in toy_city.photos(seed=seed, num_places=num_places, photos_per_place=1, days=[day]):
            write_jpeg(storage.join(root, folder, photo.path), _drawn(photo))


def _drawn(photo: Photo) -> Image.Image:
    return toy_city.draw(photo, width_px=WIDTH_PX, height_px=HEIGHT_PX)


def _check_seed(seed: int) -> None:
    if not 0 <= seed < FIRST_SEED:
        raise UserError(
            f"seed {seed}: expected 0 to {FIRST_SEED - 1}, because training sets show the streets of larger ones"
        )


def main() -> None:
    """Draw all public benchmarks in miniature."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("root", help="folder to write them into, the datasets_root of jobs")
    parser.add_argument("--places", type=int, default=4, help="places of each benchmark (4)")
    options = parser.parse_args()
    write_benchmarks(options.root, num_places=options.places)


if __name__ == "__main__":
    main()
