"""The jobs build_index, update_index and query on drawn photos: an index that lives equals one built afresh."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pairvpr.config.compose import load
from pairvpr.config.schema import BuildIndexConfig, IndexKind, QueryConfig, UpdateIndexConfig
from pairvpr.data import storage
from pairvpr.data.utm import UtmZone
from pairvpr.index.generations import read_images, read_manifest
from ray_jobs.build_index import build_index
from ray_jobs.query import query
from ray_jobs.update_index import update_index
from tests.support.located import draw_located
from tests.support.runs import SMALL_NETWORK

pytestmark = pytest.mark.usefixtures("local_ray")

DESCRIBE = (*SMALL_NETWORK, "describe.batch_size=4", "describe.num_threads_per_actor=1")
QUERY = ("rerank.num_candidates=100", "rerank.num_threads_per_actor=1", "index.num_threads_per_actor=1")


def build_from(folder: Path, output: Path, *more: str) -> str:
    line = [f"database={folder}", f"output={output}", "positions=names", "index.num_shards=2", *DESCRIBE, *more]
    return build_index(load(BuildIndexConfig, line))


def answers(index: str, queries: Path, output: Path, *more: str) -> list[dict[str, dict[str, float]]]:
    """For each query, distances and pair scores by the paths of the photos found."""
    query(
        load(QueryConfig, [f"index.path={index}", f"queries={queries}", f"output={output}", *DESCRIBE, *QUERY, *more])
    )
    manifest = read_manifest(index)
    assert manifest is not None
    paths = read_images(index, manifest).paths
    return [
        {
            what: {paths[image_id]: value for image_id, value in zip(row[ids], row[values], strict=True)}
            for what, ids, values in (
                ("distances", "candidates", "squared_distances"),
                ("scores", "reranked", "pair_scores"),
            )
        }
        for row in pq.read_table(output / "predictions.parquet").to_pylist()
    ]


def assert_equal(found: list[dict[str, dict[str, float]]], expected: list[dict[str, dict[str, float]]]) -> None:
    """Photo by photo; a photo's batch is another one in an index built afresh, so values agree up to rounding."""
    assert len(found) == len(expected)
    for here, there in zip(found, expected, strict=True):
        for what, tolerance in (("distances", 1e-5), ("scores", 1e-4)):
            assert here[what].keys() == there[what].keys()
            for path, value in there[what].items():
                assert here[what][path] == pytest.approx(value, abs=tolerance)


@pytest.fixture
def root(city: Path, tmp_path: Path) -> Path:
    """Two thirds of the city's photos in `photos`, the rest in `later`."""
    names = sorted(path.name for path in (city / "database").iterdir())
    for number, name in enumerate(names):
        target = tmp_path / ("photos" if number % 3 else "later") / name
        target.parent.mkdir(exist_ok=True)
        shutil.copy(city / "database" / name, target)
    return tmp_path


def test_added_replaced_removed_compacted(city: Path, root: Path) -> None:
    index = build_from(root / "photos", root / "index")
    here = sorted(path.name for path in (root / "photos").iterdir() if "broken" not in path.name)
    came = sorted(path.name for path in (root / "later").iterdir())
    for name in came:
        shutil.move(root / "later" / name, root / "photos" / name)
    replaced, gone = here[3], [here[0], here[7], came[2], *here[9:14]]
    shutil.copy(root / "photos" / here[5], root / "photos" / replaced)

    (root / "add.txt").write_text("\n".join([*came, replaced]))
    shared = [f"index.path={index}", "positions=names", *DESCRIBE]
    left = f"{index}/updates/000002-of-a-killed-one/parts/000000000-000000004.npz"
    storage.write_bytes(left, b"")
    added = update_index(load(UpdateIndexConfig, [*shared, f"add={root}/add.txt"]))
    assert not storage.exists(left)
    files = storage.list_files(index)
    assert update_index(load(UpdateIndexConfig, [*shared, f"add={root}/add.txt"])) == added  # finished earlier
    assert storage.list_files(index) == files
    (root / "gone.csv").write_text("path\n" + "\n".join(gone))
    removed = update_index(load(UpdateIndexConfig, [*shared, f"remove={root}/gone.csv"]))
    assert update_index(load(UpdateIndexConfig, [*shared, f"remove={root}/gone.csv"])) == removed
    assert (removed.generation, removed.num_removed) == (3, 1 + len(gone))
    (root / "kept.txt").write_text("\n".join({*came, replaced} - {*gone}))
    compact = update_index(load(UpdateIndexConfig, [*shared, "compact=true"]))
    assert compact.generation == 4
    assert sum(entry.num_removed for entry in compact.shards) < sum(entry.num_removed for entry in removed.shards)
    after = answers(index, city / "queries", root / "after")
    again = update_index(load(UpdateIndexConfig, [*shared, "compact=true"]))
    assert again == compact  # nothing to change, no generation

    for name in gone:
        (root / "photos" / name).unlink()
    assert update_index(load(UpdateIndexConfig, [*shared, f"add={root}/kept.txt"])) == compact
    fresh = build_from(root / "photos", root / "fresh")
    assert_equal(after, answers(fresh, city / "queries", root / "expected"))

    half = update_index(load(UpdateIndexConfig, [*shared, "index.kind=flat_fp16"]))
    assert (half.generation, half.kind) == (5, IndexKind.flat_fp16)


@pytest.mark.soak
def test_a_folder_below_the_root_comes_and_goes(city: Path, root: Path) -> None:
    """In an approximate index, of which queries near their prior positions find what is near, written out here."""
    index = build_from(root / "photos", root / "index", "index.kind=ivf_rabitq", "index.num_lists=4")
    first = read_manifest(index)
    assert first is not None
    expected = answers(index, city / "queries", root / "expected")
    check_near(index, city / "queries", root / "near", expected)
    (root / "photos" / "day2").mkdir()
    for path in (root / "later").iterdir():
        shutil.copy(path, root / "photos" / "day2" / path.name)
    shared = [f"index.path={index}", *DESCRIBE]
    added = update_index(load(UpdateIndexConfig, [*shared, "positions=names", f"add={root}/photos/day2"]))
    assert added.num_live > first.num_live
    both = answers(index, city / "queries", root / "both")
    assert any(path.startswith("day2/") for answer in both for path in answer["distances"])
    shutil.rmtree(root / "photos" / "day2")
    update_index(load(UpdateIndexConfig, [*shared, f"remove={root}/photos/day2"]))
    assert answers(index, city / "queries", root / "again") == expected


def check_near(index: str, queries: Path, output: Path, everything: list[dict[str, dict[str, float]]]) -> None:
    near = answers(index, queries, output, "rerank.num_candidates=3", "filter.near_m=30")
    manifest = read_manifest(index)
    assert manifest is not None
    images = read_images(index, manifest)
    where = dict(zip(images.paths, images.utm_m, strict=True))
    names = sorted(path.name for path in queries.iterdir())
    allowed = [
        {path for path in answer["distances"] if np.hypot(*(where[path] - _utm_m(name))) <= 30}
        for name, answer in zip(names, everything, strict=True)
    ]
    assert 0 < sum(map(len, allowed)) < sum(len(answer["distances"]) for answer in everything)
    for found, whole, paths in zip(near, everything, allowed, strict=True):
        assert found["distances"] == {path: value for path, value in whole["distances"].items() if path in paths}
        assert len(found["scores"]) == min(3, len(paths))


def _utm_m(name: str) -> np.ndarray:
    return np.array(name.split("@")[1:3], np.float64)


@pytest.mark.parametrize("source", ["exif", pytest.param("table", marks=pytest.mark.soak)])
def test_photos_that_join_in_degrees_are_found_in_the_zone_of_the_index(tmp_path: Path, source: str) -> None:
    """Around 12 degrees east, where zones 32 and 33 meet: those that join would have zone 33 of their own."""
    draw_located(tmp_path / "photos", {"a.jpg": 11.9997, "b.jpg": 11.9999, "c.jpg": 12.0001}, 48.0)
    line = [f"database={tmp_path}/photos", f"output={tmp_path}/index", "positions=exif", *DESCRIBE]
    index = build_index(load(BuildIndexConfig, line))
    joining = {"a.jpg": 11.9997, "p.jpg": 12.0003, "q.jpg": 12.0005}  # the first one is there already
    draw_located(tmp_path / "photos", joining, 48.0)
    (tmp_path / "add.csv").write_text("path\n" + "\n".join(joining))
    rows = [f"{path},48.0,{longitude}" for path, longitude in joining.items()]
    (tmp_path / "places.csv").write_text("\n".join(["path,latitude,longitude", *rows]))
    where = ["positions=exif"] if source == "exif" else ["positions=table", f"positions_table={tmp_path}/places.csv"]
    update_index(load(UpdateIndexConfig, [f"index.path={index}", f"add={tmp_path}/add.csv", *where, *DESCRIBE]))

    manifest = read_manifest(index)
    assert manifest is not None
    images = read_images(index, manifest)
    assert images.zone == UtmZone(32, south=False)
    (tmp_path / "queries").mkdir()
    shutil.copy(tmp_path / "photos" / "q.jpg", tmp_path / "queries")
    (tmp_path / "priors.csv").write_text("path,latitude,longitude\nq.jpg,48.0,12.0004\n")
    conditions = ["filter.near_m=20", f"filter.priors={tmp_path}/priors.csv"]
    (found,) = answers(index, tmp_path / "queries", tmp_path / "out", *conditions)
    assert sorted(found["distances"]) == ["p.jpg", "q.jpg"]
