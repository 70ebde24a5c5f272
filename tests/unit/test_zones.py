"""The UTM zone of an index's metres: recorded where degrees decided it, and whatever joins the index is put into it.

Photos lie around longitude 12 degrees, the border of zones 32 and 33, so that those that join would have another zone
of their own.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from pairvpr import Localizer, UserError
from pairvpr.config.benchmark_schema import PositionSource
from pairvpr.config.schema import FilterConfig, PositionsConfig
from pairvpr.data import sealed
from pairvpr.data.located import located
from pairvpr.data.manifest import Manifest
from pairvpr.data.positions import zone_of_metres
from pairvpr.data.utm import UtmZone, to_utm
from pairvpr.index.generations import IndexManifest, read_images
from pairvpr.index.make import image_table
from pairvpr.where import Map
from ray_jobs.query import _priors
from tests.support.located import draw_located
from tests.unit.test_localizer import BUILD, OPTIONS

WEST = UtmZone(32, south=False)
LATITUDE = 48.0
DATABASE = {"a.jpg": 11.9997, "b.jpg": 11.9999, "c.jpg": 12.0001}
JOINING = {"p.jpg": 12.0001, "q.jpg": 12.0003}
"""Longitudes in degrees."""


def table(folder: Path, name: str, longitudes: dict[str, float], zone: UtmZone | None = None) -> PositionsConfig:
    """A table of these photos in degrees, or in metres of a zone."""
    lines = ["path,latitude,longitude" if zone is None else "path,utm_east,utm_north"]
    for path, longitude in longitudes.items():
        pair = (LATITUDE, longitude) if zone is None else metres(longitude, zone)
        lines.append(f"{path},{pair[0]!r},{pair[1]!r}")
    (folder / name).write_text("\n".join(lines))
    return PositionsConfig(positions=PositionSource.table, positions_table=f"{folder}/{name}")


def metres(longitude: float, zone: UtmZone) -> tuple[float, float]:
    east_m, north_m = to_utm(np.array([LATITUDE]), np.array([longitude]), zone)[0].tolist()
    return east_m, north_m


def photos(longitudes: dict[str, float]) -> Manifest:
    return Manifest.of("root", sorted(longitudes))


def index_photos(folder: Path, zone: UtmZone | None = None) -> Manifest:
    return located(photos(DATABASE), table(folder, "database.csv", DATABASE, zone), "database")


def expected_m(longitudes: dict[str, float]) -> np.ndarray:
    """(n, 2) metres of zone 32."""
    return np.array([metres(longitude, WEST) for longitude in longitudes.values()])


def test_degrees_record_their_zone_and_metres_and_names_do_not(tmp_path: Path) -> None:
    images = index_photos(tmp_path)
    assert images.zone == WEST
    np.testing.assert_allclose(images.utm_m, expected_m(DATABASE))
    again = Manifest.parse(images.parquet_bytes(), "images.parquet", "root")
    assert again.zone == WEST
    assert again.parquet_bytes() == images.parquet_bytes()
    assert index_photos(tmp_path, WEST).zone is None
    named = Manifest.of("root", ["@500000@5300000@32@U@.jpg"])
    by_name = located(named, PositionsConfig(positions=PositionSource.names), "database")
    assert by_name.zone is None
    assert zone_of_metres(by_name) == WEST


@pytest.mark.parametrize("epsg", ["4326", "32600", "32661", "zone", ""])
def test_a_table_of_photos_in_no_zone_is_damaged(tmp_path: Path, epsg: str) -> None:
    images = index_photos(tmp_path)
    images = Manifest("root", images.table.replace_schema_metadata({"utm_epsg": epsg}))
    with pytest.raises(sealed.DamagedFileError, match=r"images\.parquet"):
        Manifest.parse(images.parquet_bytes(), "images.parquet", "root")


def test_degrees_that_join_an_index_are_put_into_its_zone(tmp_path: Path) -> None:
    images, joining = index_photos(tmp_path), table(tmp_path, "joining.csv", JOINING)
    assert located(photos(JOINING), joining, "add").zone == UtmZone(33, south=False)  # by themselves
    joined = located(photos(JOINING), joining, "add", images)
    assert joined.zone == WEST
    np.testing.assert_allclose(joined.utm_m, expected_m(JOINING))
    in_metres = located(photos(JOINING), table(tmp_path, "metres.csv", JOINING, WEST), "add", images)
    assert in_metres.zone == WEST
    np.testing.assert_allclose(in_metres.utm_m, expected_m(JOINING))


def test_priors_in_degrees_are_compared_in_the_zone_of_the_index(tmp_path: Path) -> None:
    images = index_photos(tmp_path)
    table(tmp_path, "priors.csv", JOINING)
    config = FilterConfig(near_m=25.0, priors=f"{tmp_path}/priors.csv")
    near_m, _ = _priors(config, photos(JOINING), images)
    assert near_m is not None
    np.testing.assert_allclose(near_m, expected_m(JOINING))
    with pytest.raises(UserError, match="the UTM zone of the index's metres is unknown; expected a table of metres"):
        _priors(config, photos(JOINING), index_photos(tmp_path, WEST))


def test_names_join_an_index_of_degrees_in_its_zone(tmp_path: Path) -> None:
    east_m, north_m = metres(12.0001, UtmZone(33, south=False))
    named = Manifest.of("root", [f"@{east_m:.3f}@{north_m:.3f}@33@U@.jpg"])
    joined = located(named, PositionsConfig(positions=PositionSource.names), "add", index_photos(tmp_path))
    assert joined.zone == WEST
    np.testing.assert_allclose(joined.utm_m, [metres(12.0001, WEST)], atol=0.01)


def test_another_zone_than_the_recorded_one_is_refused(tmp_path: Path) -> None:
    images = index_photos(tmp_path)
    assert Map(images, WEST.epsg).zone == WEST
    with pytest.raises(UserError, match="utm_epsg=32633: the index's positions are in EPSG:32632"):
        Map(images, 32633)


def test_an_index_of_exif_photos_answers_in_degrees(tmp_path: Path) -> None:
    draw_located(tmp_path / "photos", DATABASE, LATITUDE)
    Localizer.build(tmp_path / "photos", tmp_path / "index", positions="exif", **BUILD)
    localizer = Localizer.open(tmp_path / "index", **OPTIONS)
    found = localizer.locate(tmp_path / "photos" / "a.jpg", near=(LATITUDE, DATABASE["a.jpg"]), radius_m=20.0)
    assert sorted(match.path for match in found) == ["a.jpg", "b.jpg"]
    for match in found:
        assert match.latitude == pytest.approx(LATITUDE, abs=1e-5)
        assert match.longitude == pytest.approx(DATABASE[match.path], abs=1e-5)


def test_parts_of_an_index_in_two_zones_are_refused(tmp_path: Path) -> None:
    """Also where only one of them has a zone; a part without positions has none to compare."""
    directory, images = str(tmp_path / "index"), index_photos(tmp_path)
    east = located(photos(JOINING), table(tmp_path, "joining.csv", JOINING), "add")

    def read(*parts: Manifest) -> Manifest:
        first_ids = np.cumsum([0, *(len(part) for part in parts)]).tolist()
        tables = [
            image_table(directory, f"{number}.parquet", part, first_id)
            for number, (part, first_id) in enumerate(zip(parts, first_ids, strict=False))
        ]
        return read_images(directory, cast(IndexManifest, SimpleNamespace(images=tables, images_root="root")))

    assert read(images, east.in_zone(WEST)).zone == WEST
    assert read(photos(JOINING), images).zone == WEST
    for other in (east, east.in_zone(None)):
        with pytest.raises(UserError, match=r"1\.parquet: its metres are of another UTM zone than the index's"):
            read(images, other)


def test_names_that_state_a_zone_join_no_metres_of_an_unknown_one(tmp_path: Path) -> None:
    """Metres of a table in zone 33, whose photos have names of zone 32, or none."""
    east_m, north_m = metres(12.0001, WEST)
    name = f"@{east_m:.2f}@{north_m:.2f}@32@U@x.jpg"
    lines = f"path,utm_east,utm_north\n{name},309000,5334000\n"
    (tmp_path / "east.csv").write_text(lines)
    in_east = PositionsConfig(positions=PositionSource.table, positions_table=f"{tmp_path}/east.csv")
    for index in (
        located(Manifest.of("root", [name]), in_east, "database"),
        located(photos({"a.jpg": 12.0}), table(tmp_path, "a.csv", {"a.jpg": 12.0}, UtmZone(33, south=False)), "k"),
    ):
        assert zone_of_metres(index) is None
        with pytest.raises(UserError, match="names state UTM zone 32, but the zone of the index's metres is unknown"):
            located(Manifest.of("new", [name]), PositionsConfig(positions=PositionSource.names), "add", index)
