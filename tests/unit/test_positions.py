"""Positions from names, tables and EXIF: the same places whatever says them, and a line for all that is wrong."""

from __future__ import annotations

import csv
import io
import logging
import random
import struct
import tempfile
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.ExifTags import GPS, IFD
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import IFDRational

from pairvpr.config.benchmark_schema import FoldersConfig, PositionColumns, PositionSource
from pairvpr.data import storage, utm
from pairvpr.data.benchmarks import folders, load_benchmark, read_benchmark
from pairvpr.data.exif import NUM_HEAD_BYTES, GpsError, GpsPosition, gps_position
from pairvpr.data.manifest import Benchmark, Manifest
from pairvpr.data.positions import PositionsTable, positions_from_names, positions_from_tables, zone_of_names
from pairvpr.data.problems import FoundProblemsError, Problems
from pairvpr.errors import UserError
from pairvpr.toy import city as toy_city


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def config(root: Path | str, positions: str = "table", radius_m: float | None = 25.0, **others: Any) -> FoldersConfig:
    tables: dict[str, Any] = {"database_table": f"{root}/database.csv", "queries_table": f"{root}/queries.csv"}
    return FoldersConfig(
        name="mine",
        database=f"{root}/database",
        queries=f"{root}/queries",
        radius_m=radius_m,
        positions=PositionSource(positions),
        **((tables if positions == "table" else {}) | others),
    )


def load(root: Path, positions: str = "table", radius_m: float | None = 25.0, **others: Any) -> Benchmark:
    return load_benchmark(config(root, positions, radius_m, **others), "unused")


def problems_of(root: Path, positions: str = "table", **others: Any) -> list[str]:
    """All lines, without the folder; each is one line."""
    problems = Problems()
    with problems.gathered():
        read_benchmark(config(root, positions, **others), "unused", problems)
    assert not any("\n" in line for line in problems.lines)
    return [line.replace(f"{root}/", "") for line in problems.lines]


def positives_of(benchmark: Benchmark) -> dict[str, list[str]]:
    assert benchmark.positives is not None
    return {
        query: [benchmark.database.path(image_id) for image_id in ids]
        for query, ids in zip(benchmark.queries.paths, benchmark.positives, strict=True)
    }


def rows_of(manifest: Manifest) -> list[tuple[object, ...]]:
    names = ("path", "utm_east_m", "utm_north_m", "heading_deg")
    return [tuple(row[name] for name in names) for row in manifest.table.to_pylist()]


# Names


@pytest.mark.parametrize(
    ("name", "east_m", "north_m", "heading_deg"),
    [
        ("@0543256.96@4178906.70@10@S@@@@@@@.jpg", 543256.96, 4178906.70, None),
        ("@1@2@.jpg", 1.0, 2.0, None),
        ("sub/@-3.5@0@x.jpg", -3.5, 0.0, None),
        ("@9@9@folder/@1.25@2.5@.jpg", 1.25, 2.5, None),
        ("@0543256.96@4178906.70@10@S@037.75@-122.50@pano@@270@@@@201406@@.jpg", 543256.96, 4178906.70, 270.0),
        ("@1@2@3@4@5@6@7@8@-90.5@.jpg", 1.0, 2.0, 269.5),
        ("@1@2@3@4@5@6@7@8@north@9@.jpg", 1.0, 2.0, None),
        ("@1@2@3@4@5@6@7@8/@3@4@@@@@@@10.jpg", 3.0, 4.0, None),
        ("é\n/@1@2@\n.jpg", 1.0, 2.0, None),
    ],
)
def test_positions_and_heading_come_from_names(
    name: str, east_m: float, north_m: float, heading_deg: float | None
) -> None:
    problems = Problems()
    found = positions_from_names(Manifest.of("root", [name]), "database", problems)
    assert rows_of(found) == [(name, east_m, north_m, heading_deg)]
    assert problems.lines == []


POINT_DEG = (48.0, 12.0), (48.0002, 12.0)
"""On the border of zones 32 and 33; 22 m apart."""


def zone_names(latitude_deg: float, longitude_deg: float, number: int, band: str, label: str = "a") -> str:
    """The name of a photo at this place, in metres of a zone that need not be its own."""
    zone = utm.UtmZone(number, south=band < "N")
    ((east_m, north_m),) = utm.to_utm(np.array([latitude_deg]), np.array([longitude_deg]), zone)
    return f"@{east_m:.3f}@{north_m:.3f}@{number}@{band}@{label}@.jpg"


def test_names_of_another_zone_are_projected_into_that_of_the_database() -> None:
    database = Manifest.of("d", [zone_names(*POINT_DEG[0], 32, "U"), zone_names(*POINT_DEG[1], 32, "U")])
    queries = Manifest.of("q", [zone_names(*POINT_DEG[0], 33, "U")])
    zone = zone_of_names(database)
    assert zone == utm.UtmZone(32, south=False)
    placed = positions_from_names(database, "database", Problems())
    asked = positions_from_names(queries, "queries", Problems(), zone)
    apart_m = np.hypot(*(placed.utm_m - asked.utm_m).T)
    np.testing.assert_allclose(apart_m, [0.0, 22.24], atol=0.05)


def test_places_of_equal_metres_in_two_zones_are_not_one_place() -> None:
    names = [zone_names(48.0, 12.0, 32, "U"), zone_names(48.0, 18.0, 33, "U", "b")]
    assert names[0].split("@")[1:3] == names[1].split("@")[1:3]
    (first, second) = positions_from_names(Manifest.of("d", names), "database", Problems()).utm_m
    assert np.hypot(*(first - second)) > 400_000


@pytest.mark.parametrize("bands", ["MN", "mn", "NM"])
def test_names_on_both_sides_of_the_equator_are_neighbours(bands: str) -> None:
    sides = {"M": -0.0001, "N": 0.0001}
    names = [zone_names(sides[band.upper()], 12.0, 32, band.upper(), f"x{i}") for i, band in enumerate(bands)]
    (first, second) = positions_from_names(Manifest.of("d", sorted(names)), "database", Problems()).utm_m
    np.testing.assert_allclose(np.hypot(*(first - second)), 22.1, atol=0.1)


def test_names_of_far_zones_and_names_without_one_beside_several_are_problems() -> None:
    near = [zone_names(48.0, 12.0, 32, "U", label) for label in "ab"]
    problems = Problems()
    kept = positions_from_names(Manifest.of("d", [*near, zone_names(37.0, -122.0, 10, "S")]), "database", problems)
    assert sorted(kept.paths) == sorted(near)
    assert len(problems.lines) == 1
    assert "too far from UTM zone 32, where the database lies" in problems.lines[0]
    problems = Problems()
    positions_from_names(Manifest.of("d", [*near, "@1@2@.jpg", zone_names(48.0, 18.0, 33, "U")]), "database", problems)
    assert problems.lines == [
        "database: @1@2@.jpg states no UTM zone, and other names state several; expected it in all"
    ]


@given(
    number=st.integers(1, 60), latitude=st.floats(-79.0, 83.0), longitude=st.floats(-3.0, 3.0), by=st.integers(-1, 1)
)
def test_a_name_in_a_neighbouring_zone_says_the_same_place(
    number: int, latitude: float, longitude: float, by: int
) -> None:
    here = utm.UtmZone(number, south=latitude < 0).central_meridian_deg + longitude
    hemisphere = "M" if latitude < 0 else "N"
    names = [zone_names(latitude, here, one, hemisphere) for one in (number, (number + by - 1) % 60 + 1)]
    zone = zone_of_names(Manifest.of("d", names[:1]))
    placed = [positions_from_names(Manifest.of("d", [name]), "k", Problems(), zone).utm_m[0] for name in names]
    np.testing.assert_allclose(placed[0], placed[1], atol=0.01)


def table_of_metres(folder: Path, rows: list[tuple[str, ...]], columns: tuple[str, ...]) -> PositionsTable:
    """A table of photos at 1, 2 m with further columns."""
    lines = [f"{number}.jpg,1,2,{','.join(row)}" for number, row in enumerate(rows)]
    (folder / "t.csv").write_text("\n".join([f"path,utm_east,utm_north,{','.join(columns)}", *lines]) + "\n")
    photos = Manifest.of("d", [f"{number}.jpg" for number in range(len(rows))])
    return PositionsTable(url=str(folder / "t.csv"), key="table", photos=photos)


ONE_ZONE = [
    (("utm_zone",), [("18S",), ("18T",)], utm.UtmZone(18, south=False)),  # bands on both sides of 40 degrees north
    (("zone",), [("33",), ("33.0",), ("33U",), ("EPSG:32633",), ("32633",)], utm.UtmZone(33, south=False)),
    (("utm_zone_number", "utm_zone_letter"), [("10", "S"), ("10", "R")], utm.UtmZone(10, south=False)),
    (("utm_zone_number", "hemisphere"), [("56", "S"), ("56", "south")], utm.UtmZone(56, south=True)),
    (("utm_zone",), [("56H",), ("56J",)], utm.UtmZone(56, south=True)),
    (("utm_zone",), [("32N",), ("32n",)], utm.UtmZone(32, south=False)),
]


@pytest.mark.parametrize(("columns", "rows", "zone"), ONE_ZONE)
def test_a_table_of_metres_joins_an_index_of_its_zone_alone(
    tmp_path: Path, columns: tuple[str, ...], rows: list[tuple[str, ...]], zone: utm.UtmZone
) -> None:
    table, names = table_of_metres(tmp_path, rows, columns), PositionColumns()
    for its_zone in (None, zone):
        (placed,) = positions_from_tables([table], names, "columns", Problems(), its_zone)
        assert placed.utm_m.tolist() == [[1.0, 2.0]] * len(rows)
    for other in (utm.UtmZone(zone.number + 1, zone.south), utm.UtmZone(zone.number, not zone.south)):
        with pytest.raises(UserError, match=rf"the column .* states .*; expected metres of UTM zone {other.number} "):
            positions_from_tables([table], names, "columns", Problems(), other)


def test_s_alone_may_be_the_band_or_the_hemisphere(tmp_path: Path) -> None:
    table = table_of_metres(tmp_path, [("18S",)], ("utm_zone",))
    for south in (False, True):
        positions_from_tables([table], PositionColumns(), "columns", Problems(), utm.UtmZone(18, south))
    with pytest.raises(UserError, match="expected metres of UTM zone 19 north"):
        positions_from_tables([table], PositionColumns(), "columns", Problems(), utm.UtmZone(19, south=False))


@pytest.mark.parametrize(
    "cells", [("33", "34"), ("33N", "33S"), ("33C", "33S"), ("33U", "33H"), ("32633", "32733"), ("A", "B"), ("33", "A")]
)
def test_cells_of_several_zones(tmp_path: Path, cells: tuple[str, ...]) -> None:
    table = table_of_metres(tmp_path, [(cell,) for cell in cells], ("zone",))
    for zone in (None, utm.UtmZone(33, south=False)):
        with pytest.raises(UserError, match=r"zone states .*; expected metres of one UTM zone, or latitude"):
            positions_from_tables([table], PositionColumns(), "columns", Problems(), zone)


def test_a_cut_row_of_a_table_with_a_zone_is_one_problem(tmp_path: Path) -> None:
    table = table_of_metres(tmp_path, [("33",), ("33",)], ("zone",))
    with open(table.url, "a") as file:
        file.write("2.jpg,1\n")
    problems = Problems()
    positions_from_tables([table], PositionColumns(), "columns", problems)
    assert len(problems.lines) == 1


@pytest.mark.parametrize("column", ["utm_zone", "zone", "hemisphere", "UTM_Zone"])
def test_a_table_that_states_several_zones_is_refused(tmp_path: Path, column: str) -> None:
    for part in ("db", "q"):
        (tmp_path / part).mkdir()
        for name in "ab":
            photo = Image.new("RGB", (8, 8))
            photo.save(tmp_path / part / f"{name}.jpg")
    tables = {}
    for part, values in (("db", "XX"), ("q", "XY")):
        tables[part] = f"{tmp_path}/{part}.csv"
        rows = [f"{name}.jpg,1,2,{value}" for name, value in zip("ab", values, strict=True)]
        Path(tables[part]).write_text("\n".join([f"path,utm_east,utm_north,{column}", *rows]))
    config = FoldersConfig(
        name="f",
        database=f"{tmp_path}/db",
        queries=f"{tmp_path}/q",
        radius_m=25.0,
        positions=PositionSource.table,
        database_table=tables["db"],
        queries_table=tables["q"],
    )
    with pytest.raises(UserError, match="states X, Y; expected metres of one UTM zone, or latitude and longitude"):
        folders.load(config, Problems())
    folders.load(replace(config, queries_table=tables["db"]), Problems())


def test_the_toy_citys_names_say_what_it_knows() -> None:
    photos = toy_city.database_photos(seed=3, num_places=9)
    found = positions_from_names(Manifest.of("root", [photo.path for photo in photos]), "database", Problems())
    assert rows_of(found) == [
        (photo.path, photo.utm_east_m, photo.utm_north_m, photo.heading_deg % 360) for photo in photos
    ]


@given(st.lists(st.tuples(*[st.decimals(-99999, 9999999, places=2)] * 2, st.none() | st.integers(0, 359)), max_size=5))
def test_names_parse_back(rows: list[tuple[Any, Any, int | None]]) -> None:
    names = [
        f"@{east}@{north}@" + ("" if heading is None else f"32@U@@@@@{heading}@@") + ".jpg"
        for east, north, heading in rows
    ]
    found = positions_from_names(Manifest.of("root", names), "database", Problems())
    assert [row[1:] for row in rows_of(found)] == [
        (float(east), float(north), None if heading is None else float(heading)) for east, north, heading in rows
    ]


def test_every_name_without_coordinates_is_a_problem() -> None:
    wrong = ["plain.jpg", "@1@.jpg", "@east@north@.jpg", "@1@2.jpg", "@1@2@/photo.jpg", "x@1@2@.jpg", "@nan@1@.jpg"]
    problems = Problems()
    found = positions_from_names(Manifest.of("root", ["@1@2@.jpg", *wrong]), "benchmark.queries", problems)
    assert [line.split(" has no coordinates")[0] for line in problems.lines] == [
        f"benchmark.queries: {name}" for name in wrong
    ]
    assert rows_of(found) == [("@1@2@.jpg", 1.0, 2.0, None)]
    with pytest.raises(FoundProblemsError, match=r"^benchmark\.queries: plain\.jpg .* \(and 6 more; pairvpr"):
        problems.raise_if_any()


# Tables


def write_tables(root: Path, database: str, queries: str) -> None:
    (root / "database.csv").write_text(database)
    (root / "queries.csv").write_text(queries)


def test_a_table_of_utm_is_the_list_of_photos(tmp_path: Path) -> None:
    touch(tmp_path, "database/b.jpg", "database/a/z.png", "database/not listed.jpg", "queries/1.jpg", "queries/2.jpg")
    write_tables(
        tmp_path,
        "note,utm_north,path,utm_east,heading\n,4000020,b.jpg,500015,-90\n\nx,4000000.5,a/z.png, 5e5 ,\n",
        "path,utm_east,utm_north\r\n2.jpg,500000,4000000\r\n",
    )
    benchmark = load(tmp_path)
    assert rows_of(benchmark.database) == [
        ("a/z.png", 500000.0, 4000000.5, None),
        ("b.jpg", 500015.0, 4000020.0, 270.0),
    ]
    assert rows_of(benchmark.queries) == [("2.jpg", 500000.0, 4000000.0, None)]
    assert positives_of(benchmark) == {"2.jpg": ["a/z.png", "b.jpg"]}
    assert positives_of(load(tmp_path, radius_m=24.999)) == {"2.jpg": ["a/z.png"]}
    assert benchmark.protocol == {"positives": "radius", "radius_m": 25.0}


def test_without_a_radius_positions_are_kept_and_queries_need_none(tmp_path: Path) -> None:
    touch(tmp_path, "database/a.jpg", "queries/1.jpg", "queries/2.jpg")
    write_tables(tmp_path, "path,utm_east,utm_north\na.jpg,1,2\n", "")
    benchmark = load(tmp_path, radius_m=None, queries_table=None)
    assert rows_of(benchmark.database) == [("a.jpg", 1.0, 2.0, None)]
    assert rows_of(benchmark.queries) == [("1.jpg", None, None, None), ("2.jpg", None, None, None)]
    assert benchmark.positives is None
    assert benchmark.protocol == {"positives": "none", "radius_m": None}


def test_positives_across_the_border_of_zones_31_and_32(tmp_path: Path) -> None:
    """At 50.7753 degrees north 0.0001 degrees of longitude are 7.05 m, so 14.1 m, 24.7 m and 35.3 m lie between."""
    touch(tmp_path, *(f"database/{name}.jpg" for name in "abc"), "queries/q.jpg")
    write_tables(
        tmp_path,
        "path,latitude,longitude\na.jpg,50.7753,6.00010\nb.jpg,50.7753,6.00025\nc.jpg,50.7753,6.00040\n",
        "path,latitude,longitude,heading\nq.jpg,50.7753,5.9999,12.5\n",
    )
    benchmark = load(tmp_path)
    assert positives_of(benchmark) == {"q.jpg": ["a.jpg", "b.jpg"]}
    distances_m = np.hypot(*(benchmark.database.utm_m - benchmark.queries.utm_m[0]).T)
    np.testing.assert_allclose(distances_m, [14.107, 24.688, 35.268], rtol=1e-3)
    assert rows_of(benchmark.queries)[0][3] == 12.5


def test_positives_across_the_equator(tmp_path: Path) -> None:
    touch(tmp_path, "database/a.jpg", "database/b.jpg", "queries/q.jpg")
    write_tables(
        tmp_path,
        "path,latitude,longitude\na.jpg,-0.0001,-78.4678\nb.jpg,-0.0002,-78.4678\n",  # 11.06 m each
        "path,latitude,longitude\nq.jpg,0.0001,-78.4678\n",
    )
    assert positives_of(load(tmp_path)) == {"q.jpg": ["a.jpg"]}


def test_columns_may_have_other_names_and_parquet_and_urls_will_do(tmp_path: Path) -> None:
    root = f"memory://positions-{uuid4().hex}"
    for name in ("database/a.jpg", "database/b.jpg", "queries/q.jpg"):
        storage.write_bytes(f"{root}/{name}", b"")
    sink = io.BytesIO()
    columns: dict[str, Any] = {
        "Image": pa.array(["b.jpg", "a.jpg"]).dictionary_encode(),
        "lat": pa.array([48.0, 48.001], pa.float64()),
        "lng": pa.array(["9", "9.0"]),
        "compass": pa.array([None, 400], pa.int16()),
        "path": pa.array(["not", "this"]),
    }
    pq.write_table(pa.table(columns), sink)
    storage.write_bytes(f"{root}/database.csv", sink.getvalue())
    storage.write_bytes(f"{root}/queries.csv", b"\xef\xbb\xbfImage,lat,lng\nq.jpg,48,9.0001")
    names = PositionColumns(path="Image", latitude="lat", longitude="lng", heading="compass")
    benchmark = load_benchmark(config(root, columns=names), "unused")
    assert [row[0] for row in rows_of(benchmark.database)] == ["a.jpg", "b.jpg"]
    # Longitude 9 is the middle of zone 32, where the scale is 0.9996.
    assert [row[1] for row in rows_of(benchmark.database)] == pytest.approx([500_000.0, 500_000.0])
    assert [row[3] for row in rows_of(benchmark.database)] == [40.0, None]
    assert positives_of(benchmark) == {"q.jpg": ["b.jpg"]}
    storage.remove_tree(root)


def test_utm_columns_count_where_both_tables_have_them(tmp_path: Path) -> None:
    touch(tmp_path, "database/a.jpg", "queries/q.jpg")
    both = "path,utm_east,utm_north,latitude,longitude\n{},1,2,48,9\n"
    degrees, metres = "path,latitude,longitude\n{},48,9\n", "path,utm_east,utm_north\n{},1,2\n"
    for database, queries, east_m in ((both, both, 1.0), (both, metres, 1.0), (both, degrees, 500_000.0)):
        write_tables(tmp_path, database.format("a.jpg"), queries.format("q.jpg"))
        assert rows_of(load(tmp_path).database)[0][1] == pytest.approx(east_m)
    write_tables(tmp_path, degrees.format("a.jpg"), metres.format("q.jpg"))
    with pytest.raises(UserError, match=r"utm_east,utm_north, the other latitude,longitude; expected the same in both"):
        load(tmp_path)


def test_all_that_is_wrong_is_found_in_one_pass(tmp_path: Path) -> None:
    touch(tmp_path, *(f"database/{name}.jpg" for name in "abcdefgh"), "queries/q.jpg")
    write_tables(
        tmp_path,
        "path,latitude,longitude,heading\n"
        "a.jpg,48,9,\n"
        "b.jpg,95,9,10\n"
        "c.jpg,nan,9,10\n"
        "d.jpg,48,,10\n"
        "\n"
        "e.jpg,48,-180.5,10\n"
        "nowhere.jpg,48,9,10\n"
        "a.jpg,48,9,10\n"
        "f.jpg,48,north,inf\n"
        ",48,9,10\n"
        "g.jpg,48,139,10\n"
        "h.jpg,4",
        "path,latitude,longitude\nq.jpg,1e400,9\n",
    )
    found = problems_of(tmp_path)
    assert found == [
        "database.csv, row 13: 2 cells, expected 4",
        "database.csv, row 8: no photo 'nowhere.jpg' in database; expected a path below that folder",
        "database.csv, row 11: no photo '' in database; expected a path below that folder",
        "database.csv, row 9: a.jpg again, first in row 2",
        "database.csv, row 4: latitude is 'nan'; expected a number",
        "database.csv, row 3: latitude is '95'; expected degrees from -90 to 90",
        "database.csv, row 5: longitude is empty; expected a number",
        "database.csv, row 10: longitude is 'north'; expected a number",
        "database.csv, row 7: longitude is '-180.5'; expected degrees from -180 to 180",
        "database.csv, row 10: heading is 'inf'; expected degrees or nothing",
        "queries.csv, row 2: latitude is '1e400'; expected a number",
        "database.csv, row 12: latitude 48, longitude 139 is too far from UTM zone 32, where the database lies; "
        "expected photos within 900 km of longitude 9",
    ]
    with pytest.raises(UserError, match=r"database\.csv, row 13: 2 cells, expected 4 \(and 11 more; pairvpr check"):
        load(tmp_path)


def test_a_parquet_table_is_held_to_the_same(tmp_path: Path) -> None:
    touch(tmp_path, "database/a.jpg", "database/b.jpg", "queries/q.jpg")
    write_tables(tmp_path, "", "path,utm_east,utm_north\nq.jpg,1,2\n")
    rows: dict[str, Any] = {
        "path": ["a.jpg", None, "b.jpg"],
        "utm_east": [1.0, 2.0, float("nan")],
        "utm_north": [1, None, 3],
    }
    pq.write_table(pa.table(rows), tmp_path / "database.csv")
    assert [line.removeprefix("database.csv, ") for line in problems_of(tmp_path)] == [
        "row 2: no photo '' in database; expected a path below that folder",
        "row 3: utm_east is 'nan'; expected a number",
        "row 2: utm_north is empty; expected a number",
    ]
    whole = (tmp_path / "database.csv").read_bytes()
    pq.write_table(pa.table(rows | {"utm_north": [[1], [2], [3]]}), tmp_path / "database.csv")
    assert problems_of(tmp_path)[-1] == "database.csv: column utm_north holds list<element: int64>; expected numbers"
    (tmp_path / "database.csv").write_bytes(whole[:-20])
    (line,) = problems_of(tmp_path)
    assert line.startswith("database.csv: not a Parquet file, or a damaged one: ")


@pytest.mark.slow
def test_a_parquet_table_with_a_damaged_byte_is_one_line_or_whole(tmp_path: Path) -> None:
    """Whatever pyarrow makes of it: a `UserError`, problems or a table, and never another exception."""
    touch(tmp_path, "database/a.jpg", "queries/q.jpg")
    write_tables(tmp_path, "", "path,utm_east,utm_north\nq.jpg,1,2\n")
    file = tmp_path / "database.csv"
    pq.write_table(pa.table({"path": ["a.jpg"] * 40, "utm_east": [1.0] * 40, "utm_north": [2.0] * 40}), file)
    whole, num_refused = file.read_bytes(), 0
    for place in range(4, len(whole), 3):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        lines = problems_of(tmp_path)
        assert all("\n" not in line for line in lines)
        num_refused += "a damaged one" in lines[0]
    assert num_refused > 50


def test_photos_far_from_the_zone_are_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "database/a.jpg", "database/b.jpg", "database/c.jpg", "queries/q.jpg", "queries/r.jpg")
    header = "path,latitude,longitude\n"
    write_tables(tmp_path, f"{header}a.jpg,0,3\nb.jpg,0,3\nc.jpg,0,93\n", f"{header}q.jpg,0,3\nr.jpg,0,93\n")
    lines = problems_of(tmp_path)
    assert [line.split(": ")[0] for line in lines] == ["database.csv, row 4", "queries.csv, row 3"]
    assert all("longitude 93 is too far from UTM zone 31" in line for line in lines)
    write_tables(tmp_path, "path,utm_east,utm_north\na.jpg,1e200,3\n", "path,utm_east,utm_north\nq.jpg,0,3\n")
    assert "database.csv, row 2: utm_east is '1e200'; expected metres of one UTM zone" in problems_of(tmp_path)


EXPECTED = (
    "expected path and either utm_east,utm_north or latitude,longitude (benchmark.columns.* gives them other names)"
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"path,latitude,lon\na.jpg,48,9\n", f": its columns are path,latitude,lon; {EXPECTED}"),
        (b"name,utm_east,utm_north\na.jpg,48,9\n", f": its columns are name,utm_east,utm_north; {EXPECTED}"),
        (b"path:utm_east:utm_north\na.jpg:48:9\n", f": its columns are path:utm_east:utm_north; {EXPECTED}"),
        (b"path,utm_east,utm_north,path\na.jpg,4,9,b\n", ": more than one column path; expected path,"),
        (b"path,utm_east,utm_north\n\xff.jpg,4,9\n", ", row 2: path is b'\\xff.jpg'; expected UTF-8 text"),
        (b"path,utm_east,utm_north\n", ": no row that can be used; expected one for each photo"),
        (b"path,utm_east,utm_north\n\n \n,,\n", ": no row that can be used; expected one for each photo"),
        (b'path,utm_east,utm_north\n"a.jpg,4,9\n', ", row 2: 1 cells, expected 3"),
        (b"", ": not a CSV file: its first line is empty"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", ": not a CSV file: line 1 contains a NUL byte"),
    ],
)
def test_what_is_no_table_of_positions_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    touch(tmp_path, "database/a.jpg", "queries/q.jpg")
    write_tables(tmp_path, "path,utm_east,utm_north\na.jpg,1,2\n", "")
    (tmp_path / "queries.csv").write_bytes(content)
    assert problems_of(tmp_path)[0].startswith(f"queries.csv{message}")


def test_tables_that_are_not_there_and_both_of_them(tmp_path: Path) -> None:
    touch(tmp_path, "database/a.jpg", "queries/q.jpg")
    assert problems_of(tmp_path, queries_table=str(tmp_path)) == [
        "benchmark.database_table=database.csv: no such file; expected a CSV or Parquet file",
        f"benchmark.queries_table={tmp_path}: no such file; expected a CSV or Parquet file",
    ]


HEADER, ROW = "path,latitude,longitude", "sub/Zürich 1.jpg,47.370,8.54"


@pytest.mark.parametrize(
    "content",
    [
        f"{HEADER}\n{ROW}\n".encode(),
        f"{HEADER}\r\n{ROW}\r\n".encode("utf-8-sig"),
        f"{HEADER}\n{ROW}".encode("utf-16"),
        f"\ufeff{HEADER}\n{ROW}".encode("utf-16-be"),
        f"{HEADER}\r{ROW}\r".encode(),
        f"sep=,\n{HEADER}\n{ROW}\n".encode(),
        f"sep=;\r\n{HEADER}\r\n{ROW}\r\n".replace(",", ";").encode("utf-8-sig"),
        f"{HEADER}\n{ROW}\n".replace(",", ";").replace(".370", ",370").replace("8.54", "8,54").encode(),
        f"{HEADER}\n{ROW}\n".replace(",", "\t").encode(),
        f"{HEADER}\n{ROW}\n".replace(",", " , ").encode(),
        f"{HEADER.upper()}\n{ROW}\n".encode(),
        f"{HEADER},ort\n{ROW},Z".encode() + b"\xfcrich\n",
        f"{HEADER},{{}},{{}}\n{ROW},1,2\n".format("x", "x").encode(),
        f"{HEADER},\n{ROW},\n".encode(),
        f'{HEADER},note\n{ROW},"two\nlines"\n'.encode(),
        f"\n\n{ROW}\n,,\n".replace("\n\n", f"{HEADER}\n\n").encode(),
        f"{HEADER}\n./{ROW}\n".encode(),
        f"{HEADER}\n{ROW}\n".replace("/", "\\").encode(),
        f"{HEADER}\n{ROW}\n".replace(".jpg", ".JPG").encode(),
        f"{HEADER}\n{ROW}\n".replace("ü", "u\u0308").encode(),
        f"{HEADER}\n{ROW}\n".replace("ü", "%C3%BC").replace(" ", "%20").encode(),
    ],
)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_table_with_one_reading_is_read(tmp_path: Path, content: bytes, form: Any) -> None:
    touch(tmp_path, unicodedata.normalize(form, "database/sub/Zürich 1.jpg"), "queries/q.jpg")
    write_tables(tmp_path, "", f"{HEADER}\nq.jpg,47.370,8.54\n")
    (tmp_path / "database.csv").write_bytes(content)
    assert len(load(tmp_path).database) == 1
    assert [len(ids) for ids in load(tmp_path).positives or []] == [1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a.JPEG,1,2", "row 2: 'a.JPEG' could be several photos in database; expected the name of one as it is spelt"),
        ("../queries/q.jpg,1,2", "row 2: no photo '../queries/q.jpg' in database"),
        ("/a.jpg,1,2", "row 2: no photo '/a.jpg' in database"),
        ('b.jpg,"500,123",2', "row 2: utm_east is '500,123'; expected a number"),
        ('b.jpg,"1,234,567",2', "row 2: utm_east is '1,234,567'; expected a number"),
        ("b.jpg,1 N,2", "row 2: utm_east is '1 N'; expected a number"),
        ("b.jpg,1,2\n./b.jpg,1,2", "row 3: b.jpg again, first in row 2"),
        ("b.jpg,1,2,", "row 2: 4 cells, expected 3"),
        ("b.jpg,1,2\0", "line 2 contains a NUL byte"),
    ],
)
def test_a_row_with_more_than_one_reading_is_refused(tmp_path: Path, rows: str, message: str) -> None:
    touch(tmp_path, "database/a.jpeg", "database/a.Jpeg", "database/b.jpg", "queries/q.jpg")
    write_tables(tmp_path, f"path,utm_east,utm_north\n{rows}\n", "path,utm_east,utm_north\nq.jpg,1,2\n")
    assert message in problems_of(tmp_path)[0]


def test_rows_below_a_separator_line_are_called_by_their_own_numbers(tmp_path: Path) -> None:
    touch(tmp_path, "database/a.jpg", "queries/q.jpg")
    table = "sep=;\npath;utm_east;utm_north\na.jpg;1;2\n\nx;1\ngone.jpg;1;2\n"
    write_tables(tmp_path, table, "path,utm_east,utm_north\nq.jpg,1,2\n")
    assert [line.split(": ")[0] for line in problems_of(tmp_path)] == ["database.csv, row 5", "database.csv, row 6"]


SOUND = b'path,utm_east,utm_north,note\n./a.jpg,500010.5,4180000.25,x\nb.jpg,500120.5,4180001.25,"y, z"\n'
SOUND += b"c.JPG,500230.5,4180002.25,\n"
PIECES = [
    b",",
    b";",
    b"\t",
    b'"',
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b"\xfe",
    b"sep=;\n",
    b"-",
    b"e9",
    b"../",
    b" ",
    b"\xcc\x88",
]


def row_span(name: bytes) -> tuple[int, int]:
    """Where the row of a photo stands in the sound table, with the line break in front of it."""
    start = SOUND.index(name)
    start = SOUND.rindex(b"\n", 0, start)
    return start, SOUND.index(b"\n", start + 1) + 1


def damaged_table(rng: random.Random) -> tuple[bytes, list[tuple[int, int]]]:
    """The sound table with one to five changes, and the ranges of its bytes that they touch."""
    data, touched = SOUND, list[tuple[int, int]]()
    for place in sorted((rng.randrange(len(SOUND) + 1) for _ in range(rng.choice((1, 1, 2, 5)))), reverse=True):
        stop = min(place + rng.randrange(3), touched[-1][0] if touched else len(SOUND))
        data = data[:place] + rng.choice([rng.choice(PIECES), bytes([rng.randrange(256)])]) + data[stop:]
        touched.append((place, max(stop, place)))
    return data, touched


@pytest.mark.parametrize("num_tables", [300, pytest.param(20_000, marks=pytest.mark.soak)])
def test_damaged_tables_say_what_the_sound_one_says_or_are_refused_in_lines(tmp_path: Path, num_tables: int) -> None:
    """CSV has no checksum: a photo's place may be another one, or not there, only where its own row was touched, or
    where a quotation mark or the header makes other cells of its row."""
    photos = Manifest.of("root", ["a.jpg", "b.jpg", "c.jpg"])
    rng, counts, file = random.Random(3), Counter[str](), tmp_path / "database.csv"
    tables = [PositionsTable("benchmark.database_table", str(file), photos)]

    def answer() -> dict[str, tuple[object, ...]] | None:
        problems = Problems()
        found: dict[str, tuple[object, ...]] = {}
        with problems.gathered():
            (database,) = positions_from_tables(tables, PositionColumns(), "benchmark.columns", problems)
            assert np.isfinite(database.utm_m).all()
            found = {str(row[0]): row[1:] for row in rows_of(database)}
        assert not any("\n" in line for line in problems.lines), file.read_bytes()
        return None if problems.lines else found

    file.write_bytes(SOUND)
    sound = answer()
    assert sound is not None
    spans = {name: row_span(name[:1].encode() + b".") for name in sound}
    for _ in range(num_tables):
        data, touched = damaged_table(rng)
        file.write_bytes(data)
        found = answer()
        if found is None:
            counts["refused"] += 1
            continue
        assert found.keys() <= sound.keys()
        others = [name for name in sound if found.get(name) != sound[name]]
        for name in others:
            first, stop = spans[name]
            own = any(place <= stop and end >= first for place, end in touched)
            assert own or data.count(b'"') != SOUND.count(b'"'), data
        counts["other" if others else "the same"] += 1
    logging.getLogger(__name__).warning("%d tables: %s", num_tables, dict(counts))
    assert min(counts["refused"], counts["the same"]) > num_tables // 50


ANY_PATH = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\n"), min_size=1).filter(str.strip)
NUMBERS = st.floats(-1e8, 1e8)


@given(st.dictionaries(ANY_PATH, st.tuples(NUMBERS, NUMBERS, st.none() | st.floats(0, 359)), min_size=1, max_size=8))
def test_csv_tables_round_trip(rows: dict[str, tuple[float, float, float | None]]) -> None:
    sink = io.StringIO(newline="")
    writer = csv.writer(sink)
    writer.writerow(["path", "utm_east", "utm_north", "heading"])
    writer.writerows([path, *numbers] for path, numbers in rows.items())
    photos = Manifest.of("root", sorted([*rows, "z" * 100]))
    problems = Problems()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "database.csv").write_text(sink.getvalue(), encoding="utf-8", newline="")
        tables = [PositionsTable("benchmark.database_table", f"{folder}/database.csv", photos)]
        (database,) = positions_from_tables(tables, PositionColumns(), "benchmark.columns", problems)
    assert problems.lines == []
    assert rows_of(database) == [(path, *rows[path]) for path in sorted(rows)]


# EXIF

ORDER = {b"MM": ">", b"II": "<"}


def photo(suffix: str = "jpg", size_px: int = 32, **entries: Any) -> bytes:
    exif = Image.Exif()
    gps = exif.get_ifd(IFD.GPSInfo)
    for name, value in entries.items():
        gps[GPS[name]] = value
    sink = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size_px, size_px, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(sink, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[suffix], exif=exif.tobytes())
    return sink.getvalue()


def at(latitude: tuple[float, float, float], longitude: tuple[float, float, float], **others: object) -> dict[str, Any]:
    return {"GPSLatitudeRef": "N", "GPSLatitude": latitude, "GPSLongitudeRef": "E", "GPSLongitude": longitude} | others


WEST: dict[str, Any] = at(
    (50, 46, 31.08), (5, 59, 59.64), GPSImgDirectionRef="T", GPSImgDirection=IFDRational(3705, 10)
)
EAST: dict[str, Any] = at((50, 46, 31.08), (6, 0, 0.36), GPSImgDirectionRef="M", GPSImgDirection=IFDRational(10, 1))


def east(entries: dict[str, Any]) -> bytes:
    """The photo at the place EAST, with some other entries."""
    return photo("jpg", 32, **(EAST | entries))


def put(root: Path, name: str, data: bytes) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(data)


def test_positions_come_from_exif_across_zones(tmp_path: Path) -> None:
    """The same two places as in the table: 50.7753 north, 5.9999 and 6.0001 east."""
    put(tmp_path, "queries/q.jpg", photo(**WEST))
    for suffix in ("jpg", "png", "webp"):
        put(tmp_path, f"database/{suffix}.{suffix}", photo(suffix, **EAST))
    put(tmp_path, "database/far.jpg", east({"GPSLongitude": (6, 0, 1.44)}))
    benchmark = load(tmp_path, "exif")
    assert positives_of(benchmark) == {"q.jpg": ["jpg.jpg", "png.png", "webp.webp"]}
    assert np.hypot(*(benchmark.database.utm_m[1] - benchmark.queries.utm_m[0])) == pytest.approx(14.107, rel=1e-3)
    assert rows_of(benchmark.queries)[0][3] == 10.5
    assert rows_of(benchmark.database)[0][3] is None  # from magnetic north


def test_south_and_west_are_negative() -> None:
    found = gps_position(photo("jpg", 32, **at((33, 30, 0), (70, 36, 36), GPSLatitudeRef="S", GPSLongitudeRef="W")))
    assert (found.latitude_deg, found.longitude_deg) == pytest.approx((-33.5, -70.61))
    assert np.isnan(found.heading_deg)


@pytest.mark.parametrize("reference", ["", "\0", " ", "NS", "SN", "\0\0", "E", "X", "north", "1", "-", "N W", "\u00d1"])
@pytest.mark.parametrize("name", ["GPSLatitudeRef", "GPSLongitudeRef"])
def test_a_blank_or_foreign_reference_is_refused(name: str, reference: str) -> None:
    with pytest.raises(GpsError, match=rf"^{name} is .*; expected [NE] or [SW]$"):
        gps_position(east({name: "EW" if name == "GPSLongitudeRef" and reference == "E" else reference}))


@pytest.mark.parametrize("reference", ["s", "S", "S\0", "S ", " S", "s\0\0"])
def test_padded_and_lower_case_references_have_one_reading(reference: str) -> None:
    assert gps_position(east({"GPSLatitudeRef": reference})).latitude_deg == pytest.approx(-50.7753)


@pytest.mark.parametrize(
    ("latitude", "message"),
    [
        ((50, 61, 0), "at most 60 minutes and 60 seconds"),
        ((50, 0, 60.01), "at most 60 minutes and 60 seconds"),
        ((50, 4631, 0), "at most 60 minutes"),
        ((50.5, 30, 0), "a fraction only in the last part"),
        ((50, 30.5, 30), "a fraction only in the last part"),
        ((IFDRational(1, 0), 0, 0), "degrees, minutes and seconds"),
        ((50, 30, IFDRational(0, 0)), "degrees, minutes and seconds"),
        ((50, 30), "degrees, minutes and seconds"),
        ((50.5,), "degrees, minutes and seconds"),
    ],
)
def test_degrees_that_have_no_one_reading_are_refused(latitude: object, message: str) -> None:
    with pytest.raises(GpsError, match=rf"^GPSLatitude is .*; expected {message}"):
        gps_position(east({"GPSLatitude": latitude}))


def signed_latitude(degrees: int) -> bytes:
    """As tools write it that put the sign into the value: EXIF's type SRATIONAL."""
    data = east({"GPSLatitude": (IFDRational(77, 1), IFDRational(0, 1), IFDRational(0, 1))})
    entry = data.index(struct.pack(">HHI", GPS.GPSLatitude, 5, 3)) if b"MM" in data[:40] else -1
    order = ">" if entry >= 0 else "<"
    entry = entry if entry >= 0 else data.index(struct.pack("<HHI", GPS.GPSLatitude, 5, 3))
    data = data[:entry] + struct.pack(f"{order}HH", GPS.GPSLatitude, 10) + data[entry + 4 :]
    return data.replace(struct.pack(f"{order}I", 77), struct.pack(f"{order}i", degrees))


def test_a_value_with_a_sign_of_its_own_is_refused() -> None:
    assert gps_position(signed_latitude(33)).latitude_deg == 33.0
    with pytest.raises(
        GpsError, match=r"^GPSLatitude is \(-33\.0.*; expected no sign, because GPSLatitudeRef gives the hemisphere"
    ):
        gps_position(signed_latitude(-33))


def test_other_datums_are_refused() -> None:
    for datum in ("WGS-84", "WGS84", "wgs 84", "WGS-84\0\0", "WGS_1984", "", "\0", "   "):
        assert gps_position(east({"GPSMapDatum": datum})).latitude_deg == pytest.approx(50.7753)
    for datum in ("TOKYO", "NAD27", "ED50", "WGS-72", "WGS-85"):
        with pytest.raises(GpsError, match=rf"^GPSMapDatum is '{datum}'; expected WGS-84 or nothing"):
            gps_position(east({"GPSMapDatum": datum}))


def test_no_fix_is_no_position() -> None:
    with pytest.raises(GpsError, match="are both 0, which cameras write without a GPS fix"):
        gps_position(east({"GPSLatitude": (0, 0, 0), "GPSLongitude": (0, 0, 0)}))


@pytest.mark.parametrize(
    ("entries", "heading_deg"),
    [
        ({"GPSImgDirectionRef": "T", "GPSImgDirection": 360.0}, 0.0),
        ({"GPSImgDirectionRef": "t\0", "GPSImgDirection": 12.5}, 12.5),
        ({"GPSImgDirectionRef": "M", "GPSImgDirection": 12.5}, None),
        ({"GPSImgDirectionRef": "", "GPSImgDirection": 12.5}, None),
        ({"GPSImgDirectionRef": "T", "GPSImgDirection": 400.0}, 40.0),
        ({"GPSImgDirectionRef": "T", "GPSImgDirection": IFDRational(0, 0)}, None),
        ({"GPSImgDirectionRef": "T"}, None),
        ({"GPSAltitudeRef": b"\x09", "GPSAltitude": IFDRational(1, 0), "GPSStatus": "V", "GPSDOP": 99.0}, None),
    ],
)
def test_headings_are_true_ones_or_not_known(entries: dict[str, Any], heading_deg: float | None) -> None:
    plain = at((50, 46, 31.08), (6, 0, 0.36))
    found = gps_position(photo("jpg", 32, **(plain | entries))).heading_deg
    assert np.isnan(found) if heading_deg is None else found == heading_deg


def rational(number: int, over: int = 1) -> IFDRational:
    return IFDRational(number, over)


DEVICES: dict[str, dict[str, Any]] = {
    "iPhone": at(
        (rational(33), rational(51), rational(3528, 100)),  # type: ignore[arg-type]
        (rational(151), rational(12), rational(4012, 100)),  # type: ignore[arg-type]
        GPSLatitudeRef="S", GPSImgDirectionRef="T", GPSImgDirection=rational(1_234_567, 4567), GPSAltitudeRef=b"\0",
        GPSAltitude=rational(4212, 100), GPSSpeedRef="K", GPSSpeed=rational(0), GPSHPositioningError=rational(14),
    ),
    "Android": at(
        (rational(33), rational(51), rational(35_280_000, 1_000_000)),  # type: ignore[arg-type]
        (rational(151), rational(12), rational(40_120_000, 1_000_000)),  # type: ignore[arg-type]
        GPSLatitudeRef="S", GPSMapDatum="WGS-84", GPSImgDirectionRef="M", GPSImgDirection=rational(90),
        GPSProcessingMethod=b"ASCII\0\0\0fused",
    ),
    "GoPro": at(
        (rational(33), rational(51), rational(35_280, 1_000)),  # type: ignore[arg-type]
        (rational(151), rational(12), rational(40_120, 1_000)),  # type: ignore[arg-type]
        GPSLatitudeRef="S", GPSAltitudeRef=b"\1", GPSAltitude=rational(3, 1),
    ),
    "DJI": at(
        (rational(33), rational(51), rational(352_800, 10_000)),  # type: ignore[arg-type]
        (rational(151), rational(12), rational(401_200, 10_000)),  # type: ignore[arg-type]
        GPSLatitudeRef="S\0", GPSLongitudeRef="E\0", GPSVersionID=b"\2\3\0\0", GPSStatus="",
    ),
    "Mapillary": at(
        (rational(338_598, 10_000), rational(0), rational(0)),  # type: ignore[arg-type]
        (rational(1_512_111_444, 10_000_000), rational(0), rational(0)),  # type: ignore[arg-type]
        GPSLatitudeRef="S", GPSImgDirectionRef="T", GPSImgDirection=rational(9000, 100),
    ),
    "KartaView": at(
        (rational(33), rational(51_588, 1_000), rational(0)),  # type: ignore[arg-type]
        (rational(151), rational(126_687, 10_000), rational(0)),  # type: ignore[arg-type]
        GPSLatitudeRef="S",
    ),
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
def test_layouts_of_devices(device: str) -> None:
    """The same place in Sydney, as each of them splits degrees."""
    found = gps_position(photo("jpg", 32, **DEVICES[device]))
    assert (found.latitude_deg, found.longitude_deg) == pytest.approx((-33.8598, 151.211144), abs=1e-5)


def outcome_of_damage(data: bytes, whole: GpsPosition) -> str:
    try:
        found = gps_position(data)
    except GpsError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return "refused"
    assert np.isfinite([found.latitude_deg, found.longitude_deg]).all()
    assert np.isnan(found.heading_deg) or 0.0 <= found.heading_deg < 360.0
    return (
        "the same"
        if found.latitude_deg == whole.latitude_deg and found.longitude_deg == whole.longitude_deg
        else "other"
    )


@pytest.mark.parametrize("num_blocks", [800, pytest.param(40_000, marks=pytest.mark.soak)])
def test_damaged_exif_blocks_say_the_same_place_or_none(num_blocks: int) -> None:
    """EXIF has no checksum: a flipped bit in a digit, in a letter that stays one of the two, or in a pointer that
    still reaches numbers can't be seen. Everything else can: those bytes are told from the rest by being the
    only ones whose damage may give another place."""
    whole = photo(**WEST)
    expected, start = gps_position(whole), whole.index(b"Exif\0\0")
    (size,) = struct.unpack(">H", whole[start - 2 : start])
    block = whole[start + 6 : start - 2 + size]
    gps_at = struct.unpack_from(f"{ORDER[block[:2]]}I", block, 18)[0]
    rng, counts = random.Random(5), Counter[str]()
    for _ in range(num_blocks):
        damaged = bytearray(block)
        # Up to the GPS entries' own bytes: byte order, the main directory and the pointer to it.
        place = rng.randrange(len(block))
        damaged[place] = rng.choice((0, 255, rng.randrange(256), damaged[place] ^ 1 << rng.randrange(8)))
        found = outcome_of_damage(whole[: start + 6] + damaged + whole[start - 2 + size :], expected)
        if found == "other":
            assert place >= gps_at, f"byte {place} of the block: {block[place]} became {damaged[place]}"
        counts[found] += 1
    logging.getLogger(__name__).warning("%d EXIF blocks: %s", num_blocks, dict(counts))
    assert counts["refused"] > num_blocks // 10


def test_the_head_of_a_jpeg_is_enough_and_other_files_are_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, png = photo(size_px=600, **WEST), photo("png", size_px=300, **WEST)
    assert min(len(large), len(png)) > NUM_HEAD_BYTES
    start = png.index(b"eXIf") - 4
    end = start + 12 + struct.unpack(">I", png[start : start + 4])[0]
    late = png[:start] + png[end:-12] + png[start:end] + png[-12:]  # the chunk stands behind the pixels
    put(tmp_path, "database/large.jpg", large)
    put(tmp_path, "queries/late.png", late)
    whole: list[str] = []
    read_bytes = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda url: (whole.append(url), read_bytes(url))[1])
    assert positives_of(load(tmp_path, "exif")) == {"late.png": ["large.jpg"]}
    assert whole == [f"{tmp_path}/queries/late.png"]


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_position_needs_no_pixels(monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """Pillow's limit on pixels, which belongs to the whole process, decides about no position."""
    data = photo(suffix, **WEST)
    expected = gps_position(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    assert gps_position(data) == expected


def test_an_exif_block_cut_anywhere_never_says_another_place() -> None:
    whole = photo(**WEST)
    start = whole.index(b"Exif\0\0")
    (size,) = struct.unpack(">H", whole[start - 2 : start])
    expected, messages = gps_position(whole), set()
    for cut in range(size - 2):
        block = struct.pack(">H", cut + 2) + whole[start : start + cut]
        data = whole[: start - 2] + block + whole[start - 2 + size :]
        try:
            found = gps_position(data)
            assert (found.latitude_deg, found.longitude_deg) == (expected.latitude_deg, expected.longitude_deg)
        except GpsError as error:
            messages.add(str(error).split(";")[0])
    assert messages == {"its EXIF has no GPS position, or a damaged one"}
    messages = set[str]()
    for cut in range(len(whole)):
        try:
            assert gps_position(whole[:cut]) == expected
        except GpsError as error:
            messages.add(str(error).split(")")[1])
    assert len(messages) == 1
    assert "not a photo, or truncated" in messages.pop()


def test_photos_that_do_not_say_where_are_named_one_by_one(tmp_path: Path) -> None:
    put(tmp_path, "queries/q.jpg", photo(**WEST))
    whole = photo(**EAST)
    wrong = {
        "a.jpg": (photo(), "its EXIF has no GPS position, or a damaged one; expected GPSLatitude, GPSLatitudeRef"),
        "b.jpg": (whole[: whole.index(b"Exif\0\0") + 60], "can't be opened (OSError): not a photo, or truncated"),
        "c.jpg": (b"", "can't be opened (UnidentifiedImageError): not a photo, or truncated; expected a complete"),
        "d.jpg": (east({"GPSLatitude": (95, 0, 0)}), "GPSLatitude is 95; expected degrees from -90 to 90"),
        "e.jpg": (east({"GPSLongitude": (181, 0, 0)}), "GPSLongitude is 181; expected degrees from -180"),
        "f.jpg": (east({"GPSLatitudeRef": "E"}), "GPSLatitudeRef is 'E'; expected N or S"),
        "g.jpg": (
            east({"GPSLatitude": (IFDRational(0, 0),) * 3}),
            "GPSLatitude is (nan, nan, nan); expected degrees, minutes and seconds",
        ),
        "h.jpg": (whole.replace(b"\x88\x25", b"\x88\x26", 1), "its EXIF has no GPS position"),
    }
    for name, (data, _) in wrong.items():
        put(tmp_path, f"database/{name}", data)
    put(tmp_path, "database/good.jpg", whole)
    (tmp_path / "database" / "i.jpg").mkdir()
    (tmp_path / "database" / "j.jpg").symlink_to(tmp_path / "gone.jpg")
    found = problems_of(tmp_path, "exif")
    assert [line.split(": ", 1)[0] for line in found] == [f"database/{name}" for name in (*wrong, "j.jpg")]
    for line, (_, message) in zip(found, wrong.values(), strict=False):
        assert line.split(": ", 1)[1].startswith(message)
    assert "can't be read: " in found[-1]
    with pytest.raises(UserError, match=r"a\.jpg: its EXIF has no GPS position.* \(and 8 more; pairvpr"):
        load(tmp_path, "exif")


def test_no_photo_says_where(tmp_path: Path) -> None:
    put(tmp_path, "queries/q.jpg", photo(**WEST))
    put(tmp_path, "database/a.jpg", photo())
    assert len(problems_of(tmp_path, "exif")) == 1


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"database_table": "t.csv"}, r"benchmark\.database_table is set: expected also benchmark\.positions=table"),
        ({"queries_table": "t.csv"}, r"benchmark\.queries_table is set: expected also benchmark\.positions=table"),
        ({"positions": PositionSource.table}, r"positions=table: expected also benchmark\.database_table=FILE"),
        (
            {"positions": PositionSource.table, "database_table": "t.csv", "radius_m": 25.0},
            r"positions=table: expected also benchmark\.queries_table=FILE",
        ),
        ({"database_table": " "}, r"benchmark\.database_table is empty"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FoldersConfig(name="mine", database="d", queries="q", **settings)


def test_columns_need_names_of_their_own() -> None:
    with pytest.raises(UserError, match=r"benchmark\.columns: lat names two columns"):
        PositionColumns(latitude="lat", longitude="lat")
    with pytest.raises(UserError, match=r"benchmark\.columns\.path is empty"):
        PositionColumns(path="")


@pytest.mark.parametrize("profile_bytes", [100, 3 << 20])
@pytest.mark.parametrize("text_bytes", [100, 3 << 20])
def test_a_position_of_a_png_needs_no_profile_and_no_text(profile_bytes: int, text_bytes: int) -> None:
    """Pillow opens no PNG in which either unpacks to more than a mebibyte."""
    plain = photo("png", 32, **WEST)
    texts = PngInfo()
    texts.add_text("Comment", "x" * text_bytes, zip=True)
    with Image.open(io.BytesIO(plain)) as image:
        file = io.BytesIO()
        image.save(file, "PNG", icc_profile=bytes(profile_bytes), exif=image.getexif().tobytes(), pnginfo=texts)
    assert (b"iCCP" in file.getvalue(), b"zTXt" in file.getvalue()) == (True, True)
    assert gps_position(file.getvalue()) == gps_position(plain)
