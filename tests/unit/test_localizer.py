"""`Localizer` by itself: inputs, conditions, refusals, threads, what it reads and holds. Its bytes: tests/ray."""

from __future__ import annotations

import gc
import inspect
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from pairvpr import DescribeConfig, Localizer, PhotoError, RerankConfig, SearchConfig, UserError, Utm
from pairvpr.config.schema import BuildConfig, IndexKind
from pairvpr.data import utm
from pairvpr.data.utm import UtmZone
from pairvpr.deadline import Deadline, TooLateError
from pairvpr.index.generations import commit, read_manifest
from pairvpr.index.make import LocalRunner, next_generation
from pairvpr.index.update import without
from pairvpr.models.class_attention import class_attention
from pairvpr.models.weights import build_model, load_weights
from pairvpr.photo import Asked
from pairvpr.retrieval.describe import Describer
from pairvpr.toy import city as toy_city
from tests.support.small import small_model_config

NETWORK = replace(small_model_config(), name="small")
FEW = RerankConfig(num_candidates=6, num_threads_per_actor=1)
ONE_THREAD: dict[str, Any] = {
    "describe": DescribeConfig(num_threads_per_actor=1),
    "search": SearchConfig(num_threads_per_actor=1),
    "device": "cpu",
}
OPTIONS: dict[str, Any] = {"model": NETWORK, "rerank": FEW, **ONE_THREAD}
TWO_CANDIDATES: dict[str, Any] = {**OPTIONS, "rerank": replace(FEW, num_candidates=2)}
NEXT_TO_NO_CACHE: dict[str, Any] = {**OPTIONS, "rerank": replace(FEW, cache_gib=2e-6)}
BUILD: dict[str, Any] = {"model": NETWORK, "describe": ONE_THREAD["describe"], "device": "cpu"}
NUM_PLACES = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`photos`, one of them broken and one twice, their index, and `queries`."""
    root = tmp_path_factory.mktemp("localizer")
    for part, drawn in (
        ("photos", toy_city.database_photos(seed=5, num_places=NUM_PLACES, photos_per_place=2)),
        ("queries", toy_city.query_photos(seed=5, num_places=NUM_PLACES, photos_per_place=1)),
    ):
        (root / part).mkdir()
        for photo in drawn:
            toy_city.draw(photo, width_px=64, height_px=48).save(root / part / photo.path)
    first = sorted((root / "photos").iterdir())[0]
    shutil.copy(first, first.with_name(first.name.replace("@.jpg", "@twice.jpg")))
    (root / "photos" / "@0@0@broken.jpg").write_bytes(b"no photo")
    Localizer.build(root / "photos", root / "index", positions="names", **BUILD)
    return root


@pytest.fixture(scope="module")
def localizer(folder: Path) -> Localizer:
    return Localizer.open(folder / "index", **OPTIONS)


@pytest.fixture(scope="module")
def queries(folder: Path) -> list[Path]:
    return sorted((folder / "queries").iterdir())


def test_importing_costs_nothing() -> None:
    """A fresh process: neither torch nor faiss nor ray, and under a tenth of a second."""
    code = """
import time; started = time.perf_counter(); import pairvpr; seconds = time.perf_counter() - started
import sys
loaded = {name.split(".")[0] for name in sys.modules}
print(seconds, *sorted(loaded & {"torch", "faiss", "ray", "numpy", "hydra"}))
assert pairvpr.__all__ and set(pairvpr.__all__) <= set(dir(pairvpr))
"""
    seconds, *heavy = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    assert not heavy
    assert float(seconds) < 0.1


@pytest.mark.slow
def test_needs_neither_ray_nor_hydra(folder: Path) -> None:
    code = """
import sys
from pairvpr import Localizer
from tests.unit.test_localizer import OPTIONS
folder = sys.argv[1]
localizer = Localizer.open(folder + "/index", **OPTIONS)
assert localizer.locate(folder + "/queries/" + sys.argv[2])
print(sorted({name.split(".")[0] for name in sys.modules} & {"ray", "hydra", "omegaconf"}))
"""
    photo = next((folder / "queries").iterdir()).name
    out = subprocess.run([sys.executable, "-c", code, str(folder), photo], check=True, capture_output=True, text=True)
    assert out.stdout.split() == ["[]"]


def test_a_photo_in_every_form(localizer: Localizer, queries: list[Path]) -> None:
    expected = localizer.locate(queries[2])
    assert len(expected) == 5
    assert expected == sorted(expected, key=lambda match: -(match.pair_score or 0.0))
    with Image.open(queries[2]) as image:
        forms = [str(queries[2]), f"file://{queries[2]}", queries[2].read_bytes(), image, np.array(image)]
        for form in forms:
            assert localizer.locate(form) == expected
        image.load()  # it is still open, and as it was
    assert np.array_equal(localizer.describe(queries[2]), localizer.describe([queries[2]]))
    match = expected[0]
    assert match.url.endswith(f"/photos/{match.path}")
    east_m, north_m = (float(field) for field in match.path.split("@")[1:3])
    assert match.utm == Utm(east_m, north_m)
    degrees = utm.to_degrees(np.array([match.utm]), UtmZone(32, south=False))[0]  # zone and band of the names
    assert (match.latitude, match.longitude) == pytest.approx(tuple(degrees), abs=1e-9)
    assert match.confidence is None


def test_turned_photos_are_upright(localizer: Localizer, queries: list[Path], tmp_path: Path) -> None:
    """An image that Pillow opened goes the way of its file, EXIF's orientation included."""
    with Image.open(queries[0]) as image:
        turned = image.transpose(Image.Transpose.ROTATE_90)
        exif = Image.Exif()
        exif[0x0112] = 6
        turned.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as image:
        assert (
            localizer.locate(image)
            == localizer.locate(tmp_path / "turned.png")
            == localizer.locate(queries[0].read_bytes())
        )


@pytest.mark.parametrize(
    ("photo", "named"),
    [
        ("nowhere.jpg", "nowhere.jpg"),
        (".", "."),
        ("a\0b.jpg", "a\0b.jpg"),
        (b"", "0 bytes"),
        (b"\xff\xd8\xff\xe0 not a photo", "bytes"),
        (np.zeros((4, 4, 3), np.float32), "array (4, 4, 3) float32"),
        (np.zeros((4, 4), np.uint8), "array (4, 4) uint8"),
        (np.zeros((0, 4, 3), np.uint8), "array (0, 4, 3) uint8"),
        (17, "int"),
        (None, "NoneType"),
    ],
)
def test_a_photo_that_cannot_be_read(localizer: Localizer, queries: list[Path], photo: Any, named: str) -> None:
    """Alone it raises an error that names it; among others these are answered, and it stands in its place."""
    with pytest.raises(PhotoError) as caught:
        localizer.locate(photo)
    assert caught.value.photo.endswith(named)
    assert "\n" not in str(caught.value)
    with pytest.raises(PhotoError):
        localizer.describe([queries[0], photo])
    first, broken, last = localizer.locate([queries[0], photo, queries[1]])
    assert isinstance(broken, PhotoError)
    assert broken.photo.startswith("photos[1]: ")
    assert (first, last) == tuple(
        answer for answer in localizer.locate([queries[0], b"", queries[1]]) if not isinstance(answer, PhotoError)
    )
    assert [type(answer) for answer in localizer.locate([photo, photo])] == [PhotoError, PhotoError]


def test_describe_retrieve_and_score_are_the_steps_of_locate(localizer: Localizer, queries: list[Path]) -> None:
    located = localizer.locate(queries[3], k=6)
    (retrieved,) = localizer.retrieve(localizer.describe(queries[3]), k=6)
    assert sorted(located, key=lambda match: (match.squared_distance, match.database_id)) == [
        replace(match, pair_score=next(its.pair_score for its in located if its.path == match.path))
        for match in retrieved
    ]
    assert all(match.pair_score is None for match in retrieved)
    for match in located[:2]:
        assert localizer.score(queries[3], match.url) == pytest.approx(match.pair_score, abs=1e-5)
    shapes = np.zeros((1, 3), np.float32), np.zeros(16, np.float32), np.full((1, 16), np.nan, np.float32)
    for wrong in (*shapes, cast(Any, "text")):
        with pytest.raises(UserError, match=r"descriptors.*: expected .*\(n, 16\)"):
            localizer.retrieve(wrong)


def test_attention_is_that_of_both_directions(localizer: Localizer, queries: list[Path]) -> None:
    side = NETWORK.image_size_px // NETWORK.patch_size_px
    both = localizer.attention(queries[0], queries[1].read_bytes())
    swapped = localizer.attention(queries[1], queries[0])
    for its, same in zip(both, reversed(swapped), strict=True):
        assert its.shape == (side, side)
        assert its.sum() == pytest.approx(1)
        np.testing.assert_allclose(its, same, rtol=1e-5)
    assert not np.allclose(*both)
    model = build_model(NETWORK, load_weights(NETWORK), torch.device("cpu"))
    describer = Describer(model, 1)
    first, second = (describer.embedded(Asked(its).pixels(NETWORK))[None] for its in queries[:2])
    with torch.inference_mode():
        (over_first, _), (_, again) = class_attention(model, first, second), class_attention(model, second, first)
    np.testing.assert_allclose(both[0].ravel(), (over_first + again).numpy() / 2, rtol=1e-5)
    with pytest.raises(PhotoError, match="no-such"):
        localizer.attention(queries[0], "no-such.jpg")


def test_explained_is_score_and_attention_with_one_encoding_of_each_photo(
    localizer: Localizer, queries: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    score, grids = localizer.score(queries[0], queries[1]), localizer.attention(queries[0], queries[1])
    describer = localizer._network._pair_describer  # pyright: ignore[reportAttributeAccessIssue]
    encode, encoded = describer.embedded, []
    monkeypatch.setattr(describer, "embedded", lambda pixels: encoded.append(pixels) or encode(pixels))
    explained = localizer.explained(queries[0], queries[1])
    assert len(encoded) == 2
    assert explained.pair_score == score
    np.testing.assert_array_equal([explained.over_photo, explained.over_other], grids)
    over = Deadline()
    over.cancel()
    with pytest.raises(TooLateError):
        localizer.explained(queries[0], queries[1], deadline=over)
    assert len(encoded) == 2


def test_conditions(folder: Path, localizer: Localizer, queries: list[Path]) -> None:
    """Each condition, checked against the positions in the photos' names; in degrees as in metres."""
    everything = localizer.locate(queries[0], k=6)
    centre = everything[-1].utm
    assert centre is not None
    near = localizer.locate(queries[0], k=6, near=centre, radius_m=15.0)
    assert near
    assert all(np.hypot(*np.subtract(match.utm or (np.nan,) * 2, centre)) <= 15.0 for match in near)
    box = Utm(centre.east_m - 9, centre.north_m - 9), Utm(centre.east_m + 9, centre.north_m + 9)
    assert {match.path for match in localizer.locate(queries[0], k=6, box=box)} <= {match.path for match in near}
    several = localizer.locate(queries[:2], k=6, near=[centre, Utm(0.0, 9e6)], radius_m=15.0)
    assert not isinstance(several[0], PhotoError)
    assert [match.path for match in several[0]] == [match.path for match in near]
    assert several[1] == []

    in_degrees = Localizer.open(folder / "index", utm_epsg=32610, **OPTIONS)
    latitude, longitude = utm.to_degrees(np.array([centre]), UtmZone(10, south=False))[0]
    found = in_degrees.locate(queries[0], k=6, near=(latitude, longitude), radius_m=15.0)
    assert [match.path for match in found] == [match.path for match in near]
    assert any((match.latitude, match.longitude) == pytest.approx((latitude, longitude), abs=1e-9) for match in found)


@pytest.mark.parametrize(
    ("conditions", "says"),
    [
        ({"near": (37.0, -122.0), "radius_m": 5.0}, "too far from UTM zone 32, "),
        ({"near": (545000.0, 4175000.0), "radius_m": 5.0}, "expected latitude and longitude in degrees"),
        ({"near": Utm(1.0, 2.0)}, "expected both of them, or neither"),
        ({"radius_m": 5.0}, "expected both of them, or neither"),
        ({"near": Utm(1.0, 2.0), "radius_m": -5.0}, "radius_m=-5.0: expected a number above 0"),
        ({"near": Utm(np.nan, 2.0), "radius_m": 5.0}, "expected finite numbers"),
        ({"near": "here", "radius_m": 5.0}, "near=here: expected (latitude, longitude)"),
        ({"near": [Utm(1.0, 2.0)] * 3, "radius_m": 5.0}, "3 positions for 1 photos"),
        ({"box": (Utm(2.0, 2.0), Utm(1.0, 3.0))}, "south-west corner first"),
        ({"box": ((48.0, 11.0), Utm(1.0, 3.0))}, "both corners in degrees, or both as pairvpr.Utm"),
        ({"box": (1.0, 2.0)}, "expected two positions"),
        ({"heading_deg": 90.0}, "expected both of them, or neither"),
        ({"heading_deg": [1.0, 2.0], "within_deg": 5.0}, "one for each of 1"),
        ({"near": 5, "radius_m": 5.0}, "near=5: expected (latitude, longitude)"),
        ({"box": 5}, "box=5: expected two positions"),
        ({"heading_deg": "north", "within_deg": 5.0}, "heading_deg=north: expected a number of degrees"),
        ({"k": 2.5}, "k=2.5: expected 1 to rerank.num_candidates=6"),
        ({"k": "5"}, "k=5: expected 1 to rerank.num_candidates=6"),
        ({"k": 0}, "k=0: expected 1 to rerank.num_candidates=6"),
        ({"k": 7}, "k=7: expected 1 to rerank.num_candidates=6"),
    ],
)
def test_conditions_that_cannot_be(
    localizer: Localizer, queries: list[Path], conditions: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError) as caught:
        localizer.locate(queries[0], **conditions)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_zone_that_names_state(folder: Path, tmp_path: Path) -> None:
    """Names with zone and band make degrees known, not those of other positions, nor one that contradicts itself."""
    (tmp_path / "photos").mkdir()
    source, name = sorted((folder / "queries").iterdir())[0], ""
    for number in range(4):
        latitude, longitude = 37.77 + number / 1000, -122.42
        east_m, north_m = utm.to_utm(np.array([latitude]), np.array([longitude]), UtmZone(10, south=False))[0]
        name = f"@{east_m:.2f}@{north_m:.2f}@10@S@{latitude:.5f}@{longitude:.5f}@pano{number}@@90@@@@@@.jpg"
        shutil.copy(source, tmp_path / "photos" / name)
    options: dict[str, Any] = {"positions": "names", **BUILD}
    localizer = Localizer.build(tmp_path / "photos", tmp_path / "index", **options)
    found = localizer.locate(source, near=(37.77, -122.42), radius_m=150.0)
    assert sorted(round(match.latitude or 0.0, 3) for match in found) == [37.770, 37.771]
    assert {match.heading_deg for match in found} <= {None, 90.0}
    with pytest.raises(UserError, match="too far from UTM zone 10"):
        localizer.locate(source, near=(37.77, 20.0), radius_m=150.0)

    (tmp_path / "alone").mkdir()
    alone = ["@".join([*path.name.split("@")[:5], "@@@@@.jpg"]) for path in _photos(tmp_path)]
    for name_alone in alone:
        shutil.copy(source, tmp_path / "alone" / name_alone)
    localizer = Localizer.build(tmp_path / "alone", tmp_path / "index3", **options)
    assert len(localizer.locate(source, near=(37.77, -122.42), radius_m=150.0)) == 2
    table = tmp_path / "places.csv"
    table.write_text("\n".join(["path,utm_east,utm_north", *(f"{one},{n},9" for n, one in enumerate(alone))]))
    elsewhere = Localizer.build(tmp_path / "alone", tmp_path / "index4", positions=str(table), **BUILD)
    assert elsewhere.locate(source)[0].utm
    with pytest.raises(UserError, match="no UTM zone; expected utm_epsg="):
        elsewhere.locate(source, near=(37.77, -122.42), radius_m=5.0)

    wrong = name.replace("@37.773", "@38.773")
    shutil.copy(source, tmp_path / "photos" / wrong)
    localizer = Localizer.build(tmp_path / "photos", tmp_path / "index2", **options)
    assert localizer.locate(source)[0].latitude is None


def _photos(folder: Path) -> list[Path]:
    return sorted((folder / "photos").iterdir())


WRONG: list[Any] = [None, 5, -1, 1.5, math.nan, b"x", "", [], {}, object(), "\0", "nothing", True, ("a", "b")]


def _refused_in_a_line(call: Callable[[], object], what: str) -> None:
    """It works, or is a `UserError` of one line."""
    try:
        call()
    except Exception as error:
        if not isinstance(error, UserError) or len(str(error).splitlines()) != 1:
            pytest.fail(f"{what}: {type(error).__name__}: {error}")


@pytest.mark.slow
@pytest.mark.parametrize("value", WRONG, ids=lambda value: type(value).__name__)
def test_arguments_of_any_type_are_refused_in_a_line(
    folder: Path,
    tmp_path: Path,
    localizer: Localizer,
    queries: list[Path],
    value: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # where an index of the name `nothing` may be built
    index, photo, few = folder / "index", queries[0], tmp_path / "few"
    few.mkdir()
    shutil.copy(photo, few / photo.name)
    for name in (*inspect.signature(Localizer.open).parameters,):
        _refused_in_a_line(lambda n=name: Localizer.open(**{"index": index, **OPTIONS, n: value}), f"open {name}")
    for name in (*inspect.signature(Localizer.build).parameters,):
        given = {"photos": few, "index": tmp_path / name, **BUILD, name: value}
        _refused_in_a_line(lambda given=given: Localizer.build(**given), f"build {name}")
    for name in ("k", "near", "radius_m", "box", "heading_deg", "within_deg"):
        _refused_in_a_line(lambda n=name: localizer.locate(photo, **{n: value}), f"locate {name}")
    calls: dict[str, Callable[[], object]] = {
        "answer": lambda: localizer.answer(value),
        "locate": lambda: localizer.locate(value),
        "locate several": lambda: localizer.locate([value]),
        "describe": lambda: localizer.describe(value),
        "score": lambda: localizer.score(photo, value),
        "attention": lambda: localizer.attention(value, photo),
        "explained": lambda: localizer.explained(photo, value),
        "retrieve": lambda: localizer.retrieve(value),
        "refresh": lambda: localizer.refresh(value),
    }
    for name, call in calls.items():
        _refused_in_a_line(call, name)


def test_what_cannot_be_opened(folder: Path, tmp_path: Path, queries: list[Path]) -> None:
    index = folder / "index"
    (tmp_path / "calibration.json").write_text("{}")
    other = replace(NETWORK, descriptor_dim=8)
    unplaced = tmp_path / "unplaced"
    Localizer.build(folder / "photos", unplaced, **BUILD)
    for open_it, says in (
        (lambda: Localizer.open(tmp_path / "none"), "no finished index there"),
        (lambda: Localizer.open(folder / "photos"), "no finished index there"),
        (lambda: Localizer.open(index, generation=7, model=NETWORK), "generation=7: index .* has no such generation"),
        (lambda: Localizer.open(index, model=other), "was made with model small and weights .*, not with small"),
        (lambda: Localizer.open(index, model="vitx"), "model=vitx: unknown; expected one of tiny"),
        (lambda: Localizer.open(index, model=NETWORK, weights=tmp_path / "x.pth"), "no such file"),
        (lambda: Localizer.open(index, model=NETWORK, device="abacus"), "device=abacus: .*; expected cpu"),
        (lambda: Localizer.open(index, model=NETWORK, precision="fp8"), "precision=fp8: expected one of fp32"),
        (lambda: Localizer.open(index, model=NETWORK, calibration=tmp_path / "calibration.json"), "calibration.json"),
        (lambda: Localizer.open(index, model=NETWORK, memory_gib=-1), "memory_gib=-1: expected 0 or more"),
        (lambda: Localizer.open(index, model=NETWORK, utm_epsg=4326), "utm_epsg=4326: expected a WGS84 UTM zone"),
        (
            lambda: Localizer.open(index, model=NETWORK, utm_epsg=cast(Any, "1")),
            "utm_epsg=1: expected a WGS84 UTM zone",
        ),
        (lambda: Localizer.open(index, model=NETWORK, memory_gib=cast(Any, "1")), "memory_gib=1: expected 0 or more"),
        (lambda: Localizer.open(index, model=NETWORK, generation=cast(Any, "1")), "generation=1: index .* no such"),
        (lambda: Localizer.open(index, model=NETWORK, rerank=replace(FEW, num_candidates=0)), "a Localizer re-ranks"),
        (lambda: Localizer.build(tmp_path / "none", tmp_path / "i", model=NETWORK), "photos=.*: no such folder"),
        (lambda: Localizer.build(folder / "photos", tmp_path / "i", model=NETWORK, kind="x"), "kind=x: expected one"),
        (
            lambda: Localizer.build(folder / "photos", index, model=other, positions="names"),
            "made with different settings",
        ),
        (
            lambda: Localizer.open(unplaced, model=NETWORK).locate(queries[0], near=Utm(1.0, 2.0), radius_m=5.0),
            "the index has no position of its photos",
        ),
    ):
        opened: Callable[[], object] = open_it
        with pytest.raises(UserError, match=says) as caught:
            opened()
        assert "\n" not in str(caught.value)


def test_model_and_weights_are_those_of_the_index(folder: Path, queries: list[Path], tmp_path: Path) -> None:
    """An index of the demo's network opens by its path alone, also by an older one's name without settings.json."""
    Localizer.build(folder / "queries", tmp_path / "index", model="tiny", device="cpu", describe=ONE_THREAD["describe"])
    first = Localizer.open(tmp_path / "index", **ONE_THREAD).locate(queries[1])
    assert first[0].path == queries[1].name
    (tmp_path / "index" / "settings.json").unlink()
    assert Localizer.open(tmp_path / "index", **ONE_THREAD).locate(queries[1]) == first


@pytest.fixture(scope="module", params=[IndexKind.flat_8bit, IndexKind.ivf_fp16, IndexKind.ivf_rabitq])
def other_kind(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same photos in another kind of index."""
    directory = tmp_path_factory.mktemp("kind") / "index"
    shutil.copytree(folder / "index", directory)
    manifest = read_manifest(str(directory))
    assert manifest is not None
    num_lists = 2 if request.param.startswith("ivf") else None
    config = BuildConfig(kind=IndexKind(request.param), num_lists=num_lists, num_build_threads=1)
    commit(
        str(directory), next_generation(str(directory), replace(manifest, generation=2), config, 1e12, LocalRunner())
    )
    return directory


def bytes_read() -> int:
    """All that this process has read by system calls, in Python or below it."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


def anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    gc.collect()
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines["RssAnon"].split()[0])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts what Linux counts")
@pytest.mark.parametrize(
    "other_kind",
    [IndexKind.ivf_rabitq, *(pytest.param(kind, marks=pytest.mark.soak) for kind in ("flat_8bit", "ivf_fp16"))],
    indirect=True,
)
def test_a_thousand_calls_read_nothing_and_hold_no_more(other_kind: Path, queries: list[Path]) -> None:
    """Once each photo's features are cached, answers to pixels in memory come without a byte from a file."""
    localizer = Localizer.open(other_kind, **TWO_CANDIDATES)
    pixels = [np.array(Image.open(query)) for query in queries]
    expected = [localizer.locate(array, k=2) for array in pixels]
    for array in pixels * 5:
        localizer.locate(array, k=2)
    held, read = anonymous_bytes(), bytes_read()
    for call in range(1000):
        assert localizer.locate(pixels[call % len(pixels)], k=2) == expected[call % len(pixels)]
    assert bytes_read() - read < 16_384  # the count itself reads /proc
    assert anonymous_bytes() - held < 2 << 20


@pytest.mark.slow
def test_threads_give_the_answers_of_one(other_kind: Path, queries: list[Path]) -> None:
    """Eight at once, over a cache of features that is too small for them."""
    localizer = Localizer.open(other_kind, **OPTIONS)
    expected = [localizer.locate(query) for query in queries]
    localizer = Localizer.open(other_kind, **NEXT_TO_NO_CACHE)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(localizer.locate, queries * 12))
    assert answers == expected * 12


def test_refresh(other_kind: Path, folder: Path, queries: list[Path], tmp_path: Path) -> None:
    """A newer generation without some photos; shards that both have are not read again."""
    directory = str(shutil.copytree(other_kind, tmp_path / "index"))
    localizer = Localizer.open(directory, **OPTIONS)
    before = localizer.locate(queries[0], k=6)
    assert not localizer.refresh()
    manifest = read_manifest(directory)
    assert manifest is not None
    gone = np.sort(np.array([match.database_id for match in before[:3]]))
    draft = replace(manifest, generation=3)
    commit(directory, without(directory, draft, "updates/000003-test/", gone))
    for file in Path(directory, "shards", "00000").iterdir():
        if file.name.startswith("index"):
            file.write_bytes(b"not read again")
    assert localizer.refresh()
    assert localizer.generation == 3
    assert localizer.num_photos == manifest.num_live - 3
    after = localizer.locate(queries[0], k=6)
    assert not {match.database_id for match in after} & set(gone.tolist())
    assert len(after) == 6


def test_candidates_that_are_gone_or_changed_cost_themselves_alone(
    folder: Path, queries: list[Path], tmp_path: Path
) -> None:
    """The others keep their scores, also in later calls; a photo that comes back is scored again."""
    shutil.copytree(folder / "photos", tmp_path / "photos")
    Localizer.build(tmp_path / "photos", tmp_path / "index", **BUILD)
    before = Localizer.open(tmp_path / "index", **OPTIONS)
    whole, (_, among) = before.locate(queries[0], k=6), before.locate([b"", queries[0]], k=6)
    gone, changed = (Path(match.url) for match in (whole[0], whole[2]))
    kept = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (gone, changed)}
    gone.unlink()
    changed.write_bytes(queries[1].read_bytes())

    localizer = Localizer.open(tmp_path / "index", **OPTIONS)
    for answer, expected in (
        (localizer.locate(queries[0], k=6), whole),
        (localizer.locate([b"", queries[0]], k=6)[1], among),
    ):
        assert not isinstance(answer, PhotoError)
        assert not isinstance(expected, PhotoError)
        assert {match.database_id for match in answer} == {match.database_id for match in whole}
        assert answer[:4] == [match for match in expected if Path(match.url) not in (gone, changed)]
        assert [match.pair_score for match in answer[4:]] == [-np.inf] * 2
    for path, (data, time_ns) in kept.items():
        path.write_bytes(data)
        os.utime(path, ns=(time_ns, time_ns))
    assert localizer.locate(queries[0], k=6) == whole

    recomputing = Localizer.open(tmp_path / "index", **OPTIONS)  # with no features in its cache
    shutil.rmtree(tmp_path / "photos")
    with pytest.raises(UserError, match="this photo folder is missing or empty"):
        recomputing.locate(queries[0])


class _Vanishing(os.PathLike[str]):
    """The path of a photo that is there the first time that somebody asks, and then no more."""

    def __init__(self, path: Path) -> None:
        self._paths = [str(path)]

    def __fspath__(self) -> str:
        return self._paths.pop() if self._paths else "gone.jpg"


def test_a_photo_that_breaks_between_two_readings_is_reported_in_its_place(
    localizer: Localizer, queries: list[Path]
) -> None:
    first, gone, last = localizer.locate([queries[0], _Vanishing(queries[1]), queries[2]])
    assert isinstance(gone, PhotoError)
    assert (gone.photo, "FileNotFoundError" in gone.reason) == ("photos[1]: gone.jpg", True)
    whole = localizer.locate(queries[:3])
    assert [first, last] == [whole[0], whole[2]]


def test_an_index_without_ray_is_that_of_the_settings(folder: Path) -> None:
    """Its settings.json is what build_index would write, so that update_index and query go on with it."""
    about = json.loads((folder / "index" / "settings.json").read_text())
    assert about["database"]["num_images"] == 2 * NUM_PLACES + 2
    assert "positions_sha256" in about
    manifest = read_manifest(str(folder / "index"))
    assert manifest is not None
    assert (manifest.num_rejected, manifest.kind) == (1, "flat")
