"""Answers for other tools, read back as those tools read them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from pairvpr.data.pairs import candidates_of, read_pairs
from pairvpr.data.utm import UtmZone, to_utm
from pairvpr.report.export import export, main
from tests.support.finished import MadeUpRun, make_run

EPSG_32_NORTH = 32632
ZONE = UtmZone(32, south=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeUpRun:
    return make_run(tmp_path_factory.mktemp("run") / "OUT", paths=('odd,"name".jpg', "Straße.jpg"))


def expected_pairs(made: MadeUpRun, number: int) -> list[tuple[str, str, float]]:
    """Names below the folder that holds both, and pair scores."""
    queries, database = made.benchmark.queries, made.benchmark.database
    return [
        (f"queries/{queries.path(answer.query_id)}", f"database/{database.path(int(image_id))}", float(score))
        for answer in made.answers
        for image_id, score in list(zip(answer.reranked, answer.pair_scores, strict=True))[:number]
    ]


@pytest.mark.parametrize("form", ["hloc", "colmap"])
def test_pairs_of_hloc_and_colmap(made: MadeUpRun, form: str) -> None:
    """hloc's `parse_retrieval` and COLMAP's match lists split a line into two names."""
    written = export(made.folder, form, num_answers=5)
    lines = [line.split() for line in Path(written).read_text().splitlines()]
    assert [(query, name) for query, name in lines] == [pair[:2] for pair in expected_pairs(made, 5)]
    found = candidates_of(read_pairs(written, "k"), written, "k", made.benchmark.queries, made.benchmark.database)
    assert {query: ids.tolist() for query, ids in found.items()} == {
        answer.query_id: answer.reranked[:5].tolist() for answer in made.answers if len(answer.reranked)
    }


def test_colmap_imports_its_pairs(made: MadeUpRun, tmp_path: Path) -> None:
    """By COLMAP's own importer, into a database that holds the photos."""
    import pycolmap

    database = pycolmap.Database.open(tmp_path / "colmap.db")
    camera = database.write_camera(pycolmap.Camera.create_from_model_name(1, "SIMPLE_PINHOLE", 50, 64, 48))
    pairs = expected_pairs(made, 5)
    ids = {
        name: database.write_image(pycolmap.Image(name=name, camera_id=camera))
        for name in dict.fromkeys(name for pair in pairs for name in pair[:2])
    }
    options = pycolmap.ImportedPairingOptions()
    options.match_list_path = export(made.folder, "colmap", num_answers=5)
    found = pycolmap.ImportedPairGenerator(options, database).all_pairs()
    assert found == [(ids[query], ids[name]) for query, name, _ in pairs]


def test_kapture_pairs_are_read_by_the_rules_of_its_format(tmp_path: Path) -> None:
    """Lines behind # are comments, the first states the version; commas part fields, whose outer white space goes."""
    made = make_run(tmp_path / "OUT", paths=("Straße 1.jpg", "a 'b' \"c\".jpg"))
    lines = Path(export(made.folder, "kapture")).read_text("utf-8").splitlines()
    assert lines[:2] == ["# kapture format: 1.1", "# query_image, map_image, score"]
    rows = [[field.strip() for field in line.split(",")] for line in lines if line.strip() and not line.startswith("#")]
    assert [(query, name, float(score)) for query, name, score in rows] == expected_pairs(made, 10)


def test_geojson_puts_each_query_where_it_was_answered_to_be(made: MadeUpRun) -> None:
    content = json.loads(Path(export(made.folder, "geojson", epsg=EPSG_32_NORTH)).read_text())
    assert content["type"] == "FeatureCollection"
    utm_m, queries_m = made.benchmark.database.utm_m, made.benchmark.queries.utm_m
    assert len(content["features"]) == len(made.answers)
    for feature, answer in zip(content["features"], made.answers, strict=True):
        its = feature["properties"]
        assert its["query"] == f"queries/{made.benchmark.queries.path(answer.query_id)}"
        if not len(answer.reranked):
            assert feature["geometry"] is None
            assert (its["answer"], its["right"]) == (None, False)
            continue
        longitude, latitude = feature["geometry"]["coordinates"]
        at_m = to_utm(np.array([latitude]), np.array([longitude]), ZONE)[0]
        best = int(answer.reranked[0])
        assert at_m == pytest.approx(utm_m[best], abs=0.01)
        assert its["error_m"] == pytest.approx(np.linalg.norm(utm_m[best] - queries_m[answer.query_id]))
        assert made.benchmark.positives is not None
        assert its["right"] == (best in made.benchmark.positives[answer.query_id])


def test_csv_has_a_row_for_each_answer(made: MadeUpRun) -> None:
    with Path(export(made.folder, "csv", num_answers=3, epsg=EPSG_32_NORTH)).open(newline="") as file:
        rows = list(csv.DictReader(file))
    pairs = expected_pairs(made, 3)
    assert [(row["query"], row["database"]) for row in rows] == [pair[:2] for pair in pairs]
    assert [float(row["score"]) for row in rows] == [pair[2] for pair in pairs]
    assert [int(row["rank"]) for row in rows[:4]] == [1, 2, 3, 1]
    ids = [int(image_id) for answer in made.answers for image_id in answer.reranked[:3]]
    for row, image_id in zip(rows, ids, strict=True):
        at_m = to_utm(np.array([float(row["latitude"])]), np.array([float(row["longitude"])]), ZONE)[0]
        assert at_m == pytest.approx(made.benchmark.database.utm_m[image_id], abs=0.01)


def test_without_re_ranking_the_order_of_retrieval_is_exported(tmp_path: Path) -> None:
    made = make_run(tmp_path / "OUT", num_candidates=0)
    lines = Path(export(made.folder, "hloc", num_answers=4)).read_text().splitlines()
    database = made.benchmark.database
    expected = [database.path(int(image_id)) for answer in made.answers for image_id in answer.candidates[:4]]
    assert [line.split()[1] for line in lines] == [f"database/{path}" for path in expected]
    assert len(expected) == 4 * 39
    with Path(export(made.folder, "csv", num_answers=4)).open(newline="") as file:
        rows = list(csv.DictReader(file))
    distances = [float(value) for answer in made.answers for value in answer.squared_distances[:4]]
    assert [float(row["score"]) for row in rows] == [-value for value in distances]
    right = [float(row["right"] == "True") for row in rows if row["rank"] == "1"]
    assert 100 * sum(right) / len(made.answers) == pytest.approx(made.metrics["recall"]["global"]["1"])


def test_the_zone_is_that_of_the_names(tmp_path: Path) -> None:
    """Names that state zone 33, and metres that are theirs."""
    rng = np.random.default_rng(0)
    made = make_run(tmp_path / "plain", num_database=20)
    names = [
        f"@{east:.2f}@{north:.2f}@33@U@{number}@.jpg"
        for number, (east, north) in enumerate(made.benchmark.database.utm_m.round(2))
    ]
    stated = make_run(tmp_path / "OUT", num_database=20, paths=names, seed=0)
    content = json.loads(Path(export(stated.folder, "geojson")).read_text())
    coordinates = [its["geometry"]["coordinates"] for its in content["features"] if its["geometry"]]
    answer = stated.answers[int(rng.integers(30))]
    longitude, latitude = coordinates[answer.query_id]
    at_m = to_utm(np.array([latitude]), np.array([longitude]), UtmZone(33, south=False))[0]
    assert at_m == pytest.approx(stated.benchmark.database.utm_m[int(answer.reranked[0])], abs=0.02)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("OUT", "--to", "xyz"), "--to xyz: expected one of hloc, colmap, kapture, geojson, csv"),
        (("OUT", "--to", "geojson"), "not of which UTM zone; expected --epsg"),
        (("OUT", "--to", "geojson", "--epsg", "4326"), "utm_epsg=4326: expected a WGS84 UTM zone"),
        (("OUT", "--to", "csv", "--top", "0"), "--top 0: expected 1 or more"),
        (("OUT", "--to", "hloc", "--output", "OUT"), "--output=OUT: it is a directory"),
        (("NOWHERE", "--to", "hloc"), "NOWHERE: no run there"),
        (("BARE", "--to", "geojson"), "the run knows no photo's position"),
        (("OUT", "--to", "kapture"), "kapture's pairs can't hold a name with a comma"),
    ],
)
def test_mistakes_are_one_line(
    words: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "OUT", num_queries=9, num_database=9, paths=["a,b.jpg"])
    make_run(tmp_path / "BARE", num_queries=9, num_database=9, has_positions=False, has_truth=False)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "OUT" / "pairs-kapture.txt").exists()


def test_names_with_white_space_are_refused_by_hloc(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    made = make_run(tmp_path / "OUT", num_queries=9, num_database=9, paths=["a b.jpg"])
    assert main((made.folder, "--to", "hloc")) == 2
    assert "white space" in capsys.readouterr().err
