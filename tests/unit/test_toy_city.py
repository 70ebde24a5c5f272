"""The toy city is the same city every time, is labelled truthfully, and is neither trivial nor hopeless."""

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pairvpr.toy.city import Photo, database_photos, draw, photos, query_photos

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
WIDTH_PX, HEIGHT_PX, RADIUS_M = 160, 120, 25.0

DIGEST_IN_ANOTHER_PROCESS = """
from tests.unit.test_toy_city import digest
from pairvpr.toy.city import database_photos
print(digest(database_photos(seed=3, num_places=4)[::-1]))
"""


def drawn(photo: Photo) -> NDArray[np.uint8]:
    return np.asarray(draw(photo, width_px=WIDTH_PX, height_px=HEIGHT_PX))


def digest(taken: list[Photo]) -> str:
    """One digest of names and pixels, drawn in the given order but put together in the order of names."""
    pixels = {photo.path: drawn(photo).tobytes() for photo in taken}
    return hashlib.sha256(b"".join(path.encode() + pixels[path] for path in sorted(pixels))).hexdigest()


def thumbnails(taken: list[Photo]) -> NDArray[np.float64]:
    rows: list[NDArray[np.float64]] = []
    for photo in taken:
        grey = Image.fromarray(drawn(photo)).convert("L").resize((16, 12), Image.Resampling.BOX)
        row = np.asarray(grey, dtype=np.float64).ravel()
        rows.append((row - row.mean()) / np.linalg.norm(row - row.mean()))
    return np.stack(rows)


def distances_m(left: list[Photo], right: list[Photo]) -> NDArray[np.float64]:
    at_left, at_right = (
        np.array([(photo.utm_east_m, photo.utm_north_m) for photo in taken]) for taken in (left, right)
    )
    return np.linalg.norm(at_left[:, None] - at_right[None], axis=2)


def test_another_process_and_order_draw_the_same_bytes() -> None:
    answer = subprocess.run(
        [sys.executable, "-c", DIGEST_IN_ANOTHER_PROCESS],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip() == digest(database_photos(seed=3, num_places=4))


def test_another_seed_is_another_city() -> None:
    here = query_photos(seed=0)
    same_city = [replace(photo, day=photo.day + 1) for photo in here]
    other_city = [replace(photo, seed=1) for photo in here]
    assert not {photo.path for photo in here} & {photo.path for photo in other_city}
    thumbnails_here = thumbnails(here)
    likeness_to_same, likeness_to_other = (
        float(np.mean(np.sum(thumbnails_here * thumbnails(city), axis=1))) for city in (same_city, other_city)
    )
    assert likeness_to_same > likeness_to_other + 0.08


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**40), num_places=st.integers(1, 70), photos_per_place=st.integers(1, 4))
def test_names_are_unique_sorted_and_say_where_the_camera_stood(
    seed: int, num_places: int, photos_per_place: int
) -> None:
    taken = photos(seed=seed, num_places=num_places, photos_per_place=photos_per_place, days=(0, 7))
    paths = [photo.path for photo in taken]
    assert paths == sorted(set(paths))
    assert len(paths) == num_places * photos_per_place
    assert len({len(path) for path in paths}) == 1
    for photo, path in zip(taken, paths, strict=True):
        empty, east, north, zone, letter, _, _, _, _, heading, *_, extension = path.split("@")
        assert (empty, zone, letter, extension) == ("", "32", "U", ".jpg")
        stands = (photo.utm_east_m, photo.utm_north_m, photo.heading_deg)
        assert (float(east), float(north), float(heading)) == stands
        assert 0.0 <= photo.heading_deg < 360.0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**40), num_places=st.integers(1, 70))
def test_the_radius_holds_exactly_the_photos_of_the_place(seed: int, num_places: int) -> None:
    database = database_photos(seed=seed, num_places=num_places)
    queries = query_photos(seed=seed, num_places=num_places, photos_per_place=2)
    every = database + queries
    places = np.array([photo.place for photo in every])
    np.testing.assert_array_equal(distances_m(every, every) <= RADIUS_M, places[:, None] == places[None])


def test_more_places_and_photos_leave_the_others_as_they_were() -> None:
    few = photos(seed=5, num_places=3, photos_per_place=2, days=(0, 1))
    many = {photo.path: photo for photo in photos(seed=5, num_places=45, photos_per_place=6, days=(0, 1))}
    # By name, so that the photo drawn is the one from the larger city.
    assert digest([many[photo.path] for photo in few]) == digest(few)


def test_queries_are_other_photos_of_the_database_places_on_other_days() -> None:
    database, queries = database_photos(seed=0, num_places=6), query_photos(seed=0, num_places=6)
    assert {photo.place for photo in database} == {photo.place for photo in queries} == set(range(6))
    assert not {photo.day for photo in database} & {photo.day for photo in queries}
    pictures = [drawn(photo) for photo in (*database, *queries)]
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


def test_light_differs_between_days_at_the_same_spot() -> None:
    photo = query_photos(seed=0, num_places=1)[0]
    brightness = [drawn(replace(photo, day=day)).mean() for day in range(8)]
    assert max(brightness) > 1.3 * min(brightness)


def test_passers_by_differ_between_photos_of_one_spot_and_day() -> None:
    """Near the ground something covers the view in one photo alone; above the roofs nothing does."""
    photo = query_photos(seed=0, num_places=1)[0]
    pictures = [drawn(replace(photo, index=index)).astype(np.float64) for index in range(6)]
    usual = np.median(pictures, axis=0)
    changed = np.mean([np.abs(picture - usual) > 80.0 for picture in pictures], axis=(0, 2, 3))
    assert changed[HEIGHT_PX // 2 :].mean() > 0.01 > changed[: HEIGHT_PX // 10].mean()


@pytest.mark.parametrize(("width_px", "height_px"), [(160, 120), (224, 224), (37, 51)])
def test_photos_have_the_size_asked_for(width_px: int, height_px: int) -> None:
    picture = draw(query_photos(seed=0, num_places=1)[0], width_px=width_px, height_px=height_px)
    assert (picture.mode, picture.size) == ("RGB", (width_px, height_px))


def test_a_late_place_of_a_large_city_is_drawn_like_any_other() -> None:
    queries = query_photos(seed=0, num_places=5000)
    last = max(queries, key=lambda photo: photo.place)
    assert len({photo.path for photo in queries}) == 5000
    assert drawn(last).std() > 20.0


def test_thumbnails_find_some_places_but_not_all() -> None:
    database, queries = database_photos(seed=0), query_photos(seed=0)
    similarity = thumbnails(queries) @ thumbnails(database).T
    nearest = [database[column].place for column in similarity.argmax(axis=1)]
    recall = np.mean([photo.place == place for photo, place in zip(queries, nearest, strict=True)])
    assert 0.2 < recall < 0.8
