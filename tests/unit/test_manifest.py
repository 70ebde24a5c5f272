"""Manifests: photos in the order of their relative paths, the same wherever they lie; and the benchmark's stamp."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairvpr.data import storage
from pairvpr.data.manifest import SCHEMA, Benchmark, Manifest, folder_manifest
from pairvpr.errors import UserError

ANY_NAME = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(storage.is_inside)
NAMES = ["b/z.JPG", "a.jpg", "B.PNG", "b.jpeg", "b/a/deep.WebP", "é.bmp", "_.jpg", "10.jpg", "9.jpg", "with.dots.jpg"]
NO_PHOTOS = ["notes.txt", ".hidden.jpg", "jpg", "a.jpg.txt", "a.gif", ".a.jpg.0123.tmp", "b/readme"]


def touch(root: Path, names: list[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_photos_are_ordered_by_relative_path_and_nothing_else_is_taken(tmp_path: Path) -> None:
    touch(tmp_path, [*NAMES, *NO_PHOTOS])
    manifest = folder_manifest(str(tmp_path), "database")
    assert manifest.paths == sorted(NAMES)  # Python orders text by code point
    assert len(manifest) == len(NAMES)
    assert manifest.path(0) == "10.jpg"
    assert manifest.url(3) == f"{tmp_path}/{manifest.path(3)}"
    assert manifest.table.schema == SCHEMA
    assert manifest.table.column("image_id").to_pylist() == list(range(len(NAMES)))
    assert np.isnan(manifest.utm_m).all()
    assert manifest.utm_m.shape == (len(NAMES), 2)


def test_the_digest_does_not_depend_on_where_the_photos_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "here", NAMES)
    touch(tmp_path / "there" / "deeper", NAMES[::-1])
    here = folder_manifest(str(tmp_path / "here"), "database")
    there = folder_manifest(f"{tmp_path}/there/deeper/", "database")
    monkeypatch.chdir(tmp_path)
    relative = folder_manifest("here", "database")
    assert relative.root == str(tmp_path / "here")
    expected = hashlib.sha256("".join(f"{name}\n" for name in sorted(NAMES)).encode()).hexdigest()
    assert {here.paths_sha256, there.paths_sha256, relative.paths_sha256} == {expected}
    touch(tmp_path / "there", ["deeper/one_more.jpg"])
    assert folder_manifest(str(tmp_path / "there" / "deeper"), "database").paths_sha256 != expected


def test_missing_and_empty_folders_are_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^queries=.*nowhere: no such folder; expected a folder of \.jpg"):
        folder_manifest(str(tmp_path / "nowhere"), "queries")
    touch(tmp_path, NO_PHOTOS)
    with pytest.raises(UserError, match=r"^benchmark\.database=.*: no photo in it"):
        folder_manifest(str(tmp_path), "benchmark.database")
    with pytest.raises(UserError, match="no such folder"):
        folder_manifest("memory://nowhere-at-all", "queries")


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX alone")
def test_a_name_that_is_not_unicode_is_a_users_mistake_at_most(tmp_path: Path) -> None:
    touch(tmp_path, ["good.jpg"])
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg"))).touch()
    with contextlib.suppress(UserError):  # and nothing else
        assert "good.jpg" in folder_manifest(str(tmp_path), "database").paths


@given(st.lists(st.tuples(ANY_NAME, st.floats(-1e7, 1e7), st.floats(-1e7, 1e7), st.floats(0, 360)), max_size=8))
def test_write_and_read_round_trip(rows: list[tuple[str, float, float, float]]) -> None:
    numbers = np.array([row[1:] for row in rows], dtype=np.float64).reshape(len(rows), 3)
    manifest = Manifest.of("somewhere", [row[0] for row in rows], numbers[:, :2], numbers[:, 2])
    with tempfile.TemporaryDirectory() as folder:
        manifest.write(f"{folder}/images.parquet")
        read = Manifest.read(f"{folder}/images.parquet", "elsewhere")
    assert read.root == "elsewhere"
    assert read.paths == [row[0] for row in rows]
    assert read.paths_sha256 == manifest.paths_sha256
    np.testing.assert_array_equal(read.utm_m, numbers[:, :2])
    assert read.table.equals(manifest.table)


def test_unknown_positions_survive_the_round_trip(tmp_path: Path) -> None:
    Manifest.of("root", ["a.jpg", "b.jpg"]).write(str(tmp_path / "images.parquet"))
    read = Manifest.read(str(tmp_path / "images.parquet"), "root")
    assert read.table.column("utm_east_m").null_count == 2
    assert np.isnan(read.utm_m).all()


def test_photos_are_found_by_path_and_taken_by_id() -> None:
    manifest = Manifest.of("root", ["a.jpg", "b.jpg", "c/d.jpg"])
    assert manifest.ids_of(pa.chunked_array([["c/d.jpg", "B.jpg"], [None, "a.jpg", "a.jpg"]])).tolist() == [
        2,
        -1,
        -1,
        0,
        0,
    ]
    taken = manifest.only(np.array([2, 0])).with_positions(
        np.array([[1.0, 2.0], [3.0, np.nan]]), np.array([np.nan, 9.0])
    )
    assert taken.table.to_pylist() == [
        {"image_id": 0, "path": "c/d.jpg", "utm_east_m": 1.0, "utm_north_m": 2.0, "heading_deg": None},
        {"image_id": 1, "path": "a.jpg", "utm_east_m": 3.0, "utm_north_m": None, "heading_deg": 9.0},
    ]
    assert taken.root == "root"
    assert len(manifest.only(np.array([], np.int64))) == 0


@pytest.mark.parametrize(
    "path", ["../x.jpg", "a/../../x.jpg", "/etc/x.jpg", "a\0.jpg", "", "C:\\x.jpg", "s3://b/x.jpg"]
)
def test_a_path_that_leaves_the_folder_of_photos_is_refused(tmp_path: Path, path: str) -> None:
    Manifest.of("root", ["a.jpg", path]).write(str(tmp_path / "images.parquet"))
    with pytest.raises(UserError, match=r"images\.parquet is damaged: the path .* points outside the photo folder"):
        Manifest.read(str(tmp_path / "images.parquet"), "root")


def test_a_table_without_the_columns_is_refused_by_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image_id": [0], "path": ["a.jpg"]}), tmp_path / "images.parquet")
    with pytest.raises(UserError, match="no column utm_east_m, utm_north_m, heading_deg"):
        Manifest.read(str(tmp_path / "images.parquet"), "root")


def test_the_stamp_counts_and_identifies() -> None:
    database, queries = Manifest.of("d", ["a.jpg", "b.jpg"]), Manifest.of("q", ["1.jpg", "2.jpg", "3.jpg"])
    positives = [np.array([0, 1]), np.array([], dtype=np.int64), np.array([1])]
    protocol: dict[str, object] = {"positives": "radius", "radius_m": 25.0}
    benchmark = Benchmark(name="x", database=database, queries=queries, positives=positives, protocol=protocol)
    assert benchmark.stamp() == {
        "num_queries": 3,
        "num_queries_with_positives": 2,
        "num_queries_without_positives": 1,
        "num_database": 2,
        "queries_without_positives": "count as a miss",
        "exif_rotation": "applied",
        "positives": "radius",
        "radius_m": 25.0,
        "database_paths_sha256": hashlib.sha256(b"a.jpg\nb.jpg\n").hexdigest(),
        "queries_paths_sha256": hashlib.sha256(b"1.jpg\n2.jpg\n3.jpg\n").hexdigest(),
        "positives_sha256": hashlib.sha256(b"0 1\n\n1\n").hexdigest(),
    }
    without = Benchmark(name="x", database=database, queries=queries, positives=None, protocol=protocol).stamp()
    assert without["num_queries_with_positives"] is without["num_queries_without_positives"] is None


@pytest.mark.parametrize("name", ["C:/a.jpg", "x\\..\\y/a.jpg", "\\a.jpg"])
def test_a_name_that_no_index_takes_is_refused_before_it_is_indexed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"^database=.*: the name .* could stand for a place outside of this folder"):
        folder_manifest(str(tmp_path), "database")
    Manifest.of(str(tmp_path), [name]).write(str(tmp_path / "images.parquet"))
    with pytest.raises(UserError, match="points outside the photo folder"):
        Manifest.read(str(tmp_path / "images.parquet"), str(tmp_path))
