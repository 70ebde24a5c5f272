"""Each training set is read from its download layout; what it draws is checked against the layout, by brute force."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pairvpr.data import images, panoramas, storage
from pairvpr.data.training_sets import sfxl
from pairvpr.data.training_sets.base import TrainingSet, View
from pairvpr.data.training_sets.gsv_cities import CITIES, GsvCities, read_gsv_cities
from pairvpr.data.training_sets.landmarks import Landmarks, read_landmarks
from pairvpr.data.training_sets.places import group
from pairvpr.data.training_sets.read import FOLDERS, load_view, read_training_sets
from pairvpr.data.training_sets.sfxl import SfXl, read_sfxl
from pairvpr.errors import UserError
from pairvpr.toy.training_sets import write_gsv_cities, write_landmarks, write_sfxl

HEADER = "place_id,year,month,northdeg,city_id,lat,lon,panoid"
ORIENTATION = 0x0112


def gsv(root: Path, cities: dict[str, list[str]], header: str = HEADER) -> str:
    (root / "Dataframes").mkdir(parents=True)
    for city, rows in cities.items():
        (root / "Dataframes" / f"{city}.csv").write_text("\n".join([header, *rows, ""]))
        (root / "Images" / city).mkdir(parents=True)
    return str(root)


def gsv_rows(place_id: int, count: int) -> list[str]:
    return [f"{place_id},2015,3,9,c,1.5,-2.25,p{place_id}_{photo}" for photo in range(count)]


def landmarks(root: Path, lines: list[str]) -> str:
    (root / "train").mkdir(parents=True)
    (root / "train_clean.csv").write_text("\n".join(["landmark_id,images", *lines, ""]))
    return str(root)


def panorama(east_m: float, north_m: float, name: int = 0) -> str:
    return f"37/@{east_m:.2f}@{north_m:.2f}@10@S@@@id{name}@@{name * 7 % 360}@@@@201311@@.jpg"


def sfxl_files(root: Path, paths: list[str]) -> str:
    for path in paths:
        file = root / "panoramas" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return str(root)


@cache
def all_urls(training_set: TrainingSet, place: int) -> set[str]:
    """Every photo that a place can show, found by drawing."""
    return {
        view.url for seed in range(60) for view in training_set.draw(place, 2, np.random.default_rng(seed), broken=())
    }


# GSV-Cities


def test_gsv_names_are_made_of_the_columns(tmp_path: Path) -> None:
    rows = [
        "00042,2009,03,7,Rome,41.8900000,12.5,aB-_9",
        "42,2010,11,359,Rome,-0.00001,12.4823478612345678,123",
        "42,2011,1,0,Rome,41,1e2,NA",
        "42,2012,12,45,Rome,41.90001,-12.25,x y",
    ]
    root = gsv(tmp_path, {"Rome": rows})
    views = read_gsv_cities(root).draw(0, 4, np.random.default_rng(0))
    assert {Path(view.url).relative_to(tmp_path).as_posix() for view in views} == {
        "Images/Rome/Rome_0000042_2009_03_007_41.89_12.5_aB-_9.jpg",
        "Images/Rome/Rome_0000042_2010_11_359_-1e-05_12.482347861234567_123.jpg",
        "Images/Rome/Rome_0000042_2011_01_000_41.0_100.0_NA.jpg",
        "Images/Rome/Rome_0000042_2012_12_045_41.90001_-12.25_x y.jpg",
    }
    assert all(view.left_px is None for view in views)


def test_gsv_places_are_unique_within_a_city_only(tmp_path: Path) -> None:
    paris = [*gsv_rows(7, 5), *gsv_rows(3, 4), *gsv_rows(9, 3)]
    cities = {"PRS": paris, "Bangkok": gsv_rows(7, 4), "Boston": gsv_rows(1, 3), "Atlantis": gsv_rows(1, 9)}
    training_set = read_gsv_cities(gsv(tmp_path, cities))
    assert training_set.cities == [("Bangkok", range(1)), ("PRS", range(1, 3))]
    assert len(training_set) == 3
    expected = [("Bangkok", 7, 4), ("PRS", 3, 4), ("PRS", 7, 5)]
    for place, (city, place_id, count) in enumerate(expected):
        names = [f"Images/{city}/{city}_{place_id:07d}_2015_03_009_1.5_-2.25_p{place_id}_{i}.jpg" for i in range(count)]
        assert all_urls(training_set, place) == {str(tmp_path / name) for name in names}


def test_gsv_has_23_cities() -> None:
    assert len(set(CITIES)) == 23


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (gsv_rows(1, 4), HEADER.replace("lat", "latitude"), r"PRS\.csv: no column lat; expected place_id,year"),
        (gsv_rows(1, 4), HEADER.replace("panoid", "id").replace("year", "y"), r"PRS\.csv: no column panoid, year"),
        (
            ["x,2015,3,9,c,1.5,2.5,p"],
            HEADER,
            r"PRS\.csv: column place_id: .*'x'.*; expected int64 in every row",
        ),
        (["1,2015,3,9,c,,2.5,p"], HEADER, r"PRS\.csv: an empty cell in the column lat"),
        (["1,2015"], HEADER, r"PRS\.csv, row 2: 2 cells, expected 8"),
        (gsv_rows(1, 3), HEADER, r"Dataframes: no place with at least 4 photos in 1 CSV files"),
    ],
)
def test_gsv_csv_files_are_refused_by_name(tmp_path: Path, rows: list[str], header: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_gsv_cities(gsv(tmp_path, {"PRS": rows}, header))
    assert "\n" not in str(error.value)


def test_gsv_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"nowhere/Dataframes: no CSV file of a city; expected <City>\.csv for some of Bangkok"
    ):
        read_gsv_cities(str(tmp_path / "nowhere"))
    root = gsv(tmp_path, {"PRS": gsv_rows(1, 4)})
    (tmp_path / "Dataframes" / "PRS.csv").write_text("")
    with pytest.raises(UserError, match=r"PRS\.csv: not a CSV file: its first line is empty"):
        read_gsv_cities(root)
    (tmp_path / "Dataframes" / "PRS.csv").write_text("\n".join([HEADER, *gsv_rows(1, 4)]))
    (tmp_path / "Images" / "PRS").rmdir()
    with pytest.raises(UserError, match=r"Images/PRS: no such folder; expected the photos that Dataframes/PRS\.csv"):
        read_gsv_cities(root)


# Google Landmarks v2


def test_landmarks_lie_by_the_first_characters_of_their_ids(tmp_path: Path) -> None:
    root = landmarks(tmp_path, ["5,aaa1 bbb2 ccc3", "1,0123 4567 89ab cdef", "2,aaa1 bbb2 ccc3 ddd4 eee5"])
    training_set = read_landmarks(root)
    assert len(training_set) == 2
    assert all_urls(training_set, 0) == {
        f"{root}/train/{path}" for path in ("0/1/2/0123.jpg", "4/5/6/4567.jpg", "8/9/a/89ab.jpg", "c/d/e/cdef.jpg")
    }
    assert len(all_urls(training_set, 1)) == 5


def test_the_list_of_landmarks_may_lie_elsewhere(tmp_path: Path) -> None:
    root = landmarks(tmp_path / "photos", ["1,abcd abce abcf abcg"])
    (tmp_path / "photos" / "train_clean.csv").rename(tmp_path / "list.csv")
    with pytest.raises(UserError, match=r"train_clean\.csv: no such file; expected a CSV or Parquet file"):
        read_landmarks(root)
    assert all_urls(read_landmarks(root, str(tmp_path / "list.csv")), 0) >= {f"{root}/train/a/b/c/abcd.jpg"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["1,aaaa bbbb cccc"], "no landmark with at least 4 photos"),
        (["1,aaaa aaaa aaaa aaaa"], "no landmark with at least 4 photos"),
        (["1,aaaa bbbb cccc dd"], "the column images holds 'aaaa bbbb cccc dd'; expected ids"),
        (["1,aaaa ../b cccc dddd"], "expected ids of photos, separated by spaces"),
    ],
)
def test_lists_of_landmarks_are_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_landmarks(landmarks(tmp_path, lines))


def test_landmarks_without_photos_are_refused(tmp_path: Path) -> None:
    root = landmarks(tmp_path, ["1,aaaa bbbb cccc dddd"])
    (tmp_path / "train").rmdir()
    with pytest.raises(UserError, match=r"train: no such folder; expected the photos that .*train_clean\.csv lists"):
        read_landmarks(root)


# SF-XL


@given(st.lists(st.integers(-5, 5), max_size=60), st.integers(1, 4))
def test_rows_are_grouped_by_key(keys: list[int], min_rows: int) -> None:
    by_key: defaultdict[int, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        by_key[key].append(row)
    expected = [by_key[key] for key in sorted(by_key) if len(by_key[key]) >= min_rows]
    places = group(np.array(keys, np.int64), min_rows)
    found = [places.rows[places.offsets[i] : places.offsets[i + 1]].tolist() for i in range(len(places.offsets) - 1)]
    assert found == expected


@settings(max_examples=25)
@given(positions=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 200)), min_size=120, max_size=140))
def test_cells_hold_the_panoramas_that_lie_in_them(
    tmp_path_factory: pytest.TempPathFactory, positions: list[tuple[int, int]]
) -> None:
    directory = tmp_path_factory.mktemp("cache")
    paths = sorted(panorama(545000 + x / 5, 4180000 + y / 5, i) for i, (x, y) in enumerate(positions))
    cells: defaultdict[tuple[int, int], list[str]] = defaultdict(list)
    for path in paths:
        _, east, north, *_ = path.split("@")
        cells[int(float(east) // 15 * 15), int(float(north) // 15 * 15)].append(path)
    expected = [cells[cell] for cell in sorted(cells) if len(cells[cell]) >= 5]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "list_files", lambda _: ["readme.txt", *paths])
        training_set = read_sfxl("/nowhere", str(directory))
    ends = training_set.offsets
    found = [training_set.paths[ends[i] : ends[i + 1]].to_pylist() for i in range(len(training_set))]
    assert found == expected
    fields = [path.split("@") for path in training_set.paths.to_pylist()]
    assert training_set.utm_m.tolist() == [[float(field[1]), float(field[2])] for field in fields]
    assert training_set.yaw_deg.tolist() == [float(field[9]) for field in fields]


def test_the_grouping_is_cached_until_a_panorama_comes_or_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [panorama(545001.0 + i, 4180001.0, i) for i in range(6)]
    root, directory = sfxl_files(tmp_path / "set", paths), tmp_path / "cache"
    first = read_sfxl(root, str(directory))
    assert len(list(directory.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(panoramas, "parse_names", lambda *_: pytest.fail("worked out again"))
        again = read_sfxl(root, str(directory))
    assert again.paths == first.paths
    np.testing.assert_array_equal(again.utm_m, first.utm_m)
    sfxl_files(tmp_path / "set", [panorama(545009.0, 4180001.0, 9)])
    assert len(read_sfxl(root, str(directory)).paths) == 7
    assert len(list(directory.iterdir())) == 2


def test_the_published_grouping_is_taken_as_it_is(tmp_path: Path) -> None:
    paths = {
        (30, 15): [panorama(31.0, 16.0 + i, i) for i in range(5)],
        (0, 0): [panorama(1.0, 2.0 + i, i) for i in range(6)],
        (45, 0): [panorama(46.0, 2.0 + i, i) for i in range(5)],
    }
    torch.save(([[(30, 15), (0, 0)], [(45, 0)]], paths), tmp_path / "sfxl_M15_N1_mipc5.torch")
    for _ in ("computed", "cached"):
        training_set = read_sfxl(str(tmp_path), str(tmp_path / "cache"))
        assert training_set.offsets.tolist() == [0, 5, 11, 16]
        assert training_set.paths.to_pylist() == [path for cell in paths.values() for path in cell]
        assert training_set.utm_m[5].tolist() == [1.0, 2.0]
        views = training_set.draw(1, 2, np.random.default_rng(0))
        assert {view.url for view in views} <= {f"{tmp_path}/panoramas/{path}" for path in paths[0, 0]}


class Harmless:
    """Not a tensor, list, dict or number."""


@pytest.mark.parametrize(
    ("grouping", "message"),
    [
        ([[(0, 0)]], "not the published grouping; expected a pair"),
        (([[(0, 0)]], {(0, 0): "a"}), "not the published grouping"),
        (([[(0, 0), (15, 0)]], {(0, 0): [panorama(1, 1)]}), r"no paths of the cell \(15, 0\)"),
        (([[]], {}), "no cells"),
        (([[(0, 0)]], {(0, 0): ["photo.jpg"]}), r"photo\.jpg is not the name of a panorama"),
        (([[(0, 0)]], Harmless()), "can't be read"),
    ],
)
def test_another_grouping_is_refused(tmp_path: Path, grouping: object, message: str) -> None:
    torch.save(grouping, tmp_path / "sfxl_M15_N1_mipc5.torch")
    with pytest.raises(UserError, match=rf"sfxl_M15_N1_mipc5\.torch: .*{message}") as error:
        read_sfxl(str(tmp_path), str(tmp_path / "cache"))
    assert "\n" not in str(error.value)


def test_a_folder_without_a_place_is_refused(tmp_path: Path) -> None:
    directory = str(tmp_path / "cache")
    with pytest.raises(UserError, match="set/panoramas: no such folder; expected the panoramas of SF-XL"):
        read_sfxl(str(tmp_path / "set"), directory)
    root = sfxl_files(tmp_path / "set", ["readme.txt"])
    with pytest.raises(UserError, match="set/panoramas: no photo in it"):
        read_sfxl(root, directory)
    sfxl_files(tmp_path / "set", [panorama(545001.0, 4180001.0, i) for i in range(4)])
    with pytest.raises(UserError, match="no cell of 15 m x 15 m has 5 of the 4 panoramas"):
        read_sfxl(root, directory)
    sfxl_files(tmp_path / "set", ["photo.jpg"])
    with pytest.raises(UserError, match=r"panoramas: photo\.jpg is not the name of a panorama"):
        read_sfxl(root, directory)


def test_both_views_look_at_one_point_from_angles_that_suit(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    paths = [panorama(545010.5 + x, 4180005.5 + y, i) for i, (x, y) in enumerate(rng.uniform(0, 12, (12, 2)))]
    training_set = read_sfxl(sfxl_files(tmp_path, paths), str(tmp_path / "cache"))
    num_good = 0
    for seed in range(200):
        first, second = training_set.draw(0, 2, np.random.default_rng(seed))
        focal_m = panoramas.draw_focal_point(training_set.utm_m, np.random.default_rng(seed))
        angles_deg = []
        for view in (first, second):
            fields = view.url.split("@")
            utm_m = np.array([[float(fields[1]), float(fields[2])]])
            (angle_deg,) = panoramas.viewing_angles_deg(utm_m, focal_m)
            assert view.left_px == panoramas.left_edges_px([float(fields[9])], [angle_deg])[0]
            angles_deg.append(angle_deg)
        num_good += 3.0 <= panoramas.differences_deg(angles_deg[0], np.array(angles_deg[1:]))[0] <= 50.0
    assert num_good > 185


def test_sfxl_draws_pairs_alone(tmp_path: Path) -> None:
    paths = [panorama(545001.0 + i, 4180001.0, i) for i in range(6)]
    training_set = read_sfxl(sfxl_files(tmp_path, paths), str(tmp_path / "cache"))
    with pytest.raises(AssertionError, match="pairs"):
        training_set.draw(0, 4, np.random.default_rng(0))


# What all sets promise


def make_gsv(root: Path) -> GsvCities:
    return read_gsv_cities(gsv(root, {"Rome": [*gsv_rows(1, 4), *gsv_rows(2, 9)]}))


def make_landmarks(root: Path) -> Landmarks:
    return read_landmarks(landmarks(root, ["1,aaaa bbbb cccc dddd", "2," + " ".join(f"x{i:03d}" for i in range(9))]))


def make_sfxl(root: Path, edit: Callable[[list[str]], list[str]] = list) -> SfXl:
    rng = np.random.default_rng(0)
    paths = [
        panorama(545010.5 + 15 * (i % 2) + x, 4180005.5 + y, i) for i, (x, y) in enumerate(rng.uniform(0, 9, (14, 2)))
    ]
    return read_sfxl(sfxl_files(root, edit(paths)), str(root / "cache"))


@pytest.fixture(scope="module", params=[make_gsv, make_landmarks, make_sfxl])
def drawn_set(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    make: Callable[[Path], TrainingSet] = request.param
    return make(tmp_path_factory.mktemp("set"))


@given(data=st.data())
def test_draws_are_different_readable_and_repeatable(drawn_set: TrainingSet, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(drawn_set) - 1))
    count = 2 if isinstance(drawn_set, SfXl) else data.draw(st.integers(1, 10))
    seed = data.draw(st.integers(0, 2**32))
    members = sorted(all_urls(drawn_set, place))
    broken = data.draw(st.sets(st.sampled_from(members), max_size=len(members)))
    views = drawn_set.draw(place, count, np.random.default_rng(seed), broken)
    assert views == drawn_set.draw(place, count, np.random.default_rng(seed), sorted(broken))
    urls = [view.url for view in views]
    assert len(set(urls)) == len(urls)
    assert set(urls) <= set(members) - broken
    assert len(urls) == min(count, len(members) - len(broken))


def test_every_photo_of_a_place_comes_up_alike(drawn_set: TrainingSet) -> None:
    counts: defaultdict[str, int] = defaultdict(int)
    for seed in range(600):
        first, _ = drawn_set.draw(1, 2, np.random.default_rng(seed))
        counts[first.url] += 1
    expected = 600 / len(all_urls(drawn_set, 1))
    assert all(0.5 * expected < count < 1.7 * expected for count in counts.values())
    assert len(counts) == len(all_urls(drawn_set, 1))


# From names to pixels


def _moved(paths: list[str]) -> list[str]:
    """The last of the panoramas under another name, in its cell."""
    return [*paths[:-1], paths[-1].replace("id", "other")]


@pytest.mark.parametrize(
    ("make", "edited"),
    [
        (make_gsv, lambda root: read_gsv_cities(gsv(root, {"Rome": [*gsv_rows(1, 5), *gsv_rows(2, 8)]}))),
        (make_gsv, lambda root: read_gsv_cities(gsv(root, {"Rome": [*gsv_rows(1, 4), *gsv_rows(3, 9)]}))),
        (make_gsv, lambda root: read_gsv_cities(gsv(root, {"Miami": [*gsv_rows(1, 4), *gsv_rows(2, 9)]}))),
        (
            make_landmarks,
            lambda root: read_landmarks(landmarks(root, ["1,aaaa bbbb cccc dddd", "2,x000 x001 x002 x003"])),
        ),
        (
            make_landmarks,
            lambda root: read_landmarks(
                landmarks(root, ["2," + " ".join(f"x{i:03d}" for i in range(9)), "1,aaaa bbbb cccc dddd"])
            ),
        ),
        (make_sfxl, lambda root: make_sfxl(root, _moved)),
    ],
)
def test_the_digest_is_that_of_what_is_drawn_from_wherever_it_lies(
    tmp_path: Path, make: Callable[[Path], TrainingSet], edited: Callable[[Path], TrainingSet]
) -> None:
    """Another list with as many places has another digest; a copy in another folder has the same."""
    first, copied, other = (make_it(tmp_path / str(n)) for n, make_it in enumerate((make, make, edited)))
    assert first.places_sha256 == copied.places_sha256
    assert len(first) == len(other)
    assert first.places_sha256 != other.places_sha256


def test_sets_are_read_by_name_from_their_folders(tmp_path: Path) -> None:
    write_gsv_cities(str(tmp_path / FOLDERS["gsv_cities"]), num_places=2, cities=("OSL",), width_px=32, height_px=24)
    write_landmarks(str(tmp_path / FOLDERS["gldv2"]), num_places=3, width_px=32, height_px=24)
    gldv2, gsv_cities = read_training_sets(["gldv2", "gsv_cities"], str(tmp_path), str(tmp_path / "cache"))
    assert (gldv2.name, gsv_cities.name) == ("gldv2", "gsv_cities")
    assert (len(gldv2), len(gsv_cities)) == (3, 2)
    for training_set in (gldv2, gsv_cities):
        for place in range(len(training_set)):
            for view in training_set.draw(place, 4, np.random.default_rng(0)):
                image = load_view(view)
                assert (image.mode, image.size) == ("RGB", (32, 24))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["gsv_cities", "gsv"], "train.datasets: unknown gsv; expected some of sfxl, gsv_cities, gldv2"),
        ([], "train.datasets: none given; expected"),
        (["gldv2", "gldv2"], "train.datasets: gldv2, gldv2 lists a dataset twice"),
    ],
)
def test_unknown_names_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_training_sets(names, str(tmp_path), str(tmp_path))


def test_a_view_of_a_photo_is_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # the stored top row is the right-hand column
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0] = 255
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    upright = np.asarray(load_view(View(str(tmp_path / "photo.png"))))
    np.testing.assert_array_equal(upright, np.rot90(pixels, -1))


def test_a_view_of_a_panorama_is_its_crop(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (512, 3328, 3), dtype=np.uint8)
    url = str(tmp_path / "panorama.bmp")
    Image.fromarray(pixels).save(url)
    np.testing.assert_array_equal(np.asarray(load_view(View(url, 3000))), np.roll(pixels, -3000, axis=1)[:, :512])


def test_broken_photos_and_stores_that_fail_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.jpg").write_text("hello")
    for name in ("text.jpg", "missing.jpg"):
        with pytest.raises(images.BrokenImageError):
            load_view(View(str(tmp_path / name)))

    def unreachable(url: str) -> bytes:
        raise storage.StorageError(f"{url}: no answer")

    monkeypatch.setattr(storage, "read_bytes", unreachable)
    with pytest.raises(storage.StorageError, match="no answer"):
        load_view(View("s3://bucket/photo.jpg"))


def test_reading_sets_does_not_import_torch() -> None:
    code = "import sys, pairvpr.data.training_sets.read; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# The miniatures


def files_of(root: Path) -> dict[str, bytes]:
    return {path: (root / path).read_bytes() for path in storage.list_files(str(root))}


def test_miniatures_are_the_same_each_time(tmp_path: Path) -> None:
    for copy in ("a", "b"):
        write_gsv_cities(str(tmp_path / copy / "gsv"), num_places=1, width_px=32, height_px=24)
        write_landmarks(str(tmp_path / copy / "gldv2"), num_places=1, width_px=32, height_px=24)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_the_miniature_of_sfxl_has_one_cell_per_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sfxl(str(tmp_path / "sf_xl"), num_places=2, panoramas_per_place=2)
    monkeypatch.setattr(sfxl, "MIN_PANORAMAS", 2)
    training_set = read_sfxl(str(tmp_path / "sf_xl"), str(tmp_path / "cache"))
    assert training_set.offsets.tolist() == [0, 2, 4]
    for view in training_set.draw(1, 2, np.random.default_rng(0)):
        image = load_view(view)
        assert image.size == (512, 512)
        assert np.asarray(image).std() > 10


def test_panoramas_of_any_yaw_show_the_same_fronts_in_the_same_direction(tmp_path: Path) -> None:
    """The same court from the same spot and day: only the yaw, and with it the columns, differs."""
    from pairvpr.toy import city as toy_city
    from pairvpr.toy import training_sets as toy_training_sets

    (photo,) = toy_city.photos(seed=2000, num_places=1, photos_per_place=1, days=[0])
    views = [
        np.asarray(panoramas.crop(drawn, int(panoramas.left_edges_px([yaw_deg], [100.0])[0]))).astype(int)
        for yaw_deg in (10, 275)
        for drawn in [toy_training_sets._draw_panorama(photo, 0, 1.0, -2.0, yaw_deg)]
    ]
    shift_px = min(
        range(-4, 5), key=lambda shift: int(np.abs(np.roll(views[0], shift, axis=1) - views[1]).mean() * 1e6)
    )
    assert abs(shift_px) <= 3
    assert np.abs(np.roll(views[0], shift_px, axis=1) - views[1]).mean() < 8


@pytest.mark.parametrize("write", [write_gsv_cities, write_landmarks, write_sfxl])
def test_miniatures_keep_off_the_streets_of_benchmarks(tmp_path: Path, write: Callable[..., None]) -> None:
    with pytest.raises(UserError, match="seed 0: expected 1000 or more, because benchmarks"):
        write(str(tmp_path), seed=0)


def test_a_city_that_gsv_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no city Atlantis in GSV-Cities; expected some of Bangkok"):
        write_gsv_cities(str(tmp_path), cities=("Rome", "Atlantis"))
