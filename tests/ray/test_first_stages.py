"""Other first stages than Pair-VPR's own in front of the pair step: given candidates, descriptors in a file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from pairvpr.config.compose import load, load_evaluations
from pairvpr.config.schema import BuildIndexConfig, CalibrateConfig, QueryConfig, UpdateIndexConfig
from pairvpr.data.pairs import hloc_lines
from pairvpr.errors import UserError
from pairvpr.evaluation.calibrate import calibrate
from pairvpr.index.generations import read_images
from ray_jobs.build_index import build_index
from ray_jobs.evaluate import evaluate, prepare
from ray_jobs.query import query
from ray_jobs.run import open_manifest
from ray_jobs.update_index import update_index
from tests.support.runs import SMALL_NETWORK, arguments

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def rows(expected: bytes, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the pipeline without Ray answers in the city."""
    file = tmp_path_factory.mktemp("rows") / "expected.parquet"
    file.write_bytes(expected)
    return pq.read_table(file).to_pylist()


def photo_names(folder: Path) -> list[str]:
    """In the order of ids."""
    return sorted(str(path.relative_to(folder)) for path in folder.iterdir())


def test_given_candidates_are_scored_and_nothing_is_searched(
    city: Path, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The candidates of a run, written for hloc and read back, have the run's scores; there is no index."""
    names = photo_names(city / "database")
    pairs = [(row["query_path"], names[image_id]) for row in rows for image_id in row["candidates"][:10]]
    (tmp_path / "pairs.txt").write_bytes(hloc_lines(pairs))
    line = arguments(city, tmp_path / "out", f"rerank.candidates={tmp_path}/pairs.txt")
    (content,) = evaluate(load_evaluations(line))
    found = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pylist()
    for row, its in zip(rows, found, strict=True):
        assert its["candidates"] == row["candidates"][:10]
        assert (its["reranked"], its["pair_scores"]) == (row["reranked"], row["pair_scores"])
        assert all(distance != distance for distance in its["squared_distances"])
    assert content["index"] is None
    assert not (tmp_path / "out" / "index").exists()
    assert not (tmp_path / "out" / "queries").exists()
    with pytest.raises(UserError, match=r"a run with rerank\.candidates, whose distances nobody knows"):
        calibrate(load(CalibrateConfig, [f"predictions={tmp_path}/out", f"output={tmp_path}/calibration.json"]))

    scored = [(*pair, -float(place)) for place, pair in enumerate(pairs)]  # the same order, said by scores
    table = pa.table(dict(zip(("query", "database", "score"), map(list, zip(*scored, strict=True)), strict=True)))
    pq.write_table(table.take(list(range(len(table)))[::-1]), tmp_path / "pairs.txt")
    (other,) = load_evaluations(line)
    with pytest.raises(UserError, match=r"made with different settings: rerank\.candidates_sha256"):
        evaluate([other])
    evaluate(load_evaluations([*line, f"output={tmp_path}/again"]))
    again = pq.read_table(tmp_path / "again" / "predictions.parquet")
    known = ["query_path", "candidates", "reranked", "pair_scores", "positives"]  # a distance is no number
    assert again.select(known).to_pylist() == [{name: row[name] for name in known} for row in found]


def test_what_given_candidates_can_not_have() -> None:
    given = "rerank.candidates=pairs.txt"
    with pytest.raises(UserError, match="nobody knows the distances of given"):
        load_evaluations(
            ["benchmark=toy_city", "output=out", given, "rerank.decision=fused", "rerank.calibration=c.json"]
        )
    place = ["filter.near_m=5", "filter.center=[0,0]"]
    with pytest.raises(UserError, match="what is given is not searched for"):
        load(QueryConfig, ["index.path=i", "queries=q", "output=o", given, *place])
    with pytest.raises(UserError, match="the file is for one benchmark"):
        prepare(load_evaluations(["benchmarks=[toy_city,pitts30k_val]", "datasets_root=/", "output=out", given]))


@pytest.fixture(scope="module")
def ours(city: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of our own first stage, three shards."""
    folder = tmp_path_factory.mktemp("ours")
    evaluate(load_evaluations(arguments(city, folder, "index.num_shards=3", "rerank.num_candidates=4")))
    return folder


def described(directory: Path) -> tuple[list[str], NDArray[np.float32]]:
    """Paths and rows of a description of ours, by numpy alone."""
    paths = pq.read_table(directory / "images.parquet")["path"].to_pylist()
    shards = sorted((directory / "shards").iterdir())
    ids = np.concatenate([np.load(shard / "ids.npy") for shard in shards])
    return [paths[i] for i in ids], np.concatenate([np.load(shard / "descriptors.npy") for shard in shards])


def write_npy(file: Path, paths: list[str], rows: NDArray[Any]) -> str:
    """`FILE.npy` with its list, in a mixed order."""
    order = np.random.default_rng(0).permutation(len(paths))
    np.save(file, rows[order])
    file.with_suffix(".txt").write_text("".join(f"{paths[i]}\n" for i in order))
    return str(file)


def write_parquet(file: Path, paths: list[str], rows: NDArray[Any]) -> str:
    """The same as Parquet of several row groups."""
    order = np.random.default_rng(1).permutation(len(paths))
    lists = pa.FixedSizeListArray.from_arrays(pa.array(rows[order].ravel()), rows.shape[1])
    pq.write_table(pa.table({"path": [paths[i] for i in order], "descriptor": lists}), file, row_group_size=7)
    return str(file)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking for weights fails the test."""
    monkeypatch.setattr("ray_jobs.run.find_weights", lambda _: pytest.fail("weights are looked for"))


def test_our_own_descriptors_read_back_give_the_same_index_and_answers(city: Path, ours: Path, tmp_path: Path) -> None:
    """Byte for byte: shards, faiss files, predictions; rows of the file in any order, one file for both kinds."""
    (database, rows), (queries, query_rows) = described(ours / "index"), described(ours / "queries")
    both = write_parquet(tmp_path / "both.parquet", database + queries, np.concatenate([rows, query_rows]))
    more = ("index.num_shards=3", "rerank.num_candidates=4", f"describe.descriptors={both}")
    (content,) = evaluate(load_evaluations(arguments(city, tmp_path / "out", *more)))
    for name in ("ids.npy", "descriptors.npy", "index.faiss"):
        for shard in sorted((ours / "index" / "shards").iterdir()):
            its = tmp_path / "out" / "index" / "shards" / shard.name / name
            assert its.read_bytes() == (shard / name).read_bytes()
    assert (tmp_path / "out" / "predictions.parquet").read_bytes() == (ours / "predictions.parquet").read_bytes()
    assert content["first_stage"] == {"name": "descriptors", "descriptor_dim": rows.shape[1]}
    rejected = pq.read_table(tmp_path / "out" / "index" / "rejected.parquet").to_pylist()
    assert [row["error"] for row in rejected] == [f"{both} has no row of it"]
    assert rejected[0]["path"].endswith("@broken.jpg")


@pytest.mark.usefixtures("no_network")
def test_a_file_alone_builds_updates_and_answers_without_a_network(city: Path, ours: Path, tmp_path: Path) -> None:
    """No pair is scored: what is nearest by numpy is the answer, before photos are added and after."""
    (database, rows), (queries, query_rows) = described(ours / "index"), described(ours / "queries")
    width = 3  # any network's
    draw = np.random.default_rng(7).normal
    rows, query_rows = draw(size=(len(rows), width)).astype(np.float16), draw(size=(len(queries), width))
    query_rows = query_rows.astype(np.float32)
    photos, later, added = tmp_path / "photos", tmp_path / "later", database[::5]
    shutil.copytree(city / "database", photos)
    later.mkdir()
    for path in added:
        shutil.move(photos / path, later / path)
    file = write_npy(tmp_path / "rows.npy", database, rows)
    asked = write_npy(tmp_path / "asked.npy", queries, query_rows)
    line = [f"database={photos}", f"output={tmp_path}/index", "index.num_shards=2", f"describe.descriptors={file}"]
    index = build_index(load(BuildIndexConfig, line))

    def answers(output: str) -> list[set[str]]:
        line = [f"index.path={index}", f"queries={city}/queries", f"output={tmp_path}/{output}"]
        line += [f"describe.descriptors={asked}", "rerank.num_candidates=0", "index.num_retrieved=5"]
        query(load(QueryConfig, line))
        table = pq.read_table(tmp_path / output / "predictions.parquet").to_pylist()
        known = read_images(index, open_manifest(index, index))
        return [{known.path(i) for i in row["candidates"]} for row in table if row["candidates"]]

    def nearest(paths: list[str]) -> list[set[str]]:
        some = rows[[database.index(path) for path in paths]].astype(np.float64)
        distances = ((query_rows.astype(np.float64)[:, None] - some) ** 2).sum(axis=2)
        return [set(np.array(paths)[np.argsort(row)[:5]]) for row in distances]

    assert answers("before") == nearest([path for path in database if path not in added])
    for path in added:
        shutil.move(later / path, photos / path)
    (tmp_path / "add.txt").write_text("\n".join(added))
    line = [f"index.path={index}", f"add={tmp_path}/add.txt", f"describe.descriptors={file}"]
    update_index(load(UpdateIndexConfig, line))
    assert answers("after") == nearest(database)

    wide = write_npy(tmp_path / "wide.npy", queries, np.ones((len(queries), 4), np.float32))
    line = [f"index.path={index}", f"queries={city}/queries", f"output={tmp_path}/wide", "rerank.num_candidates=0"]
    with pytest.raises(UserError, match="has descriptors of 3 values, descriptors of 4"):
        query(load(QueryConfig, [*line, f"describe.descriptors={wide}"]))


def test_an_index_of_a_file_and_one_of_a_network_do_not_meet(city: Path, ours: Path, tmp_path: Path) -> None:
    (database, rows), (queries, query_rows) = described(ours / "index"), described(ours / "queries")
    file = write_npy(tmp_path / "rows.npy", queries, query_rows)
    shared = [f"queries={city}/queries", f"output={tmp_path}/out", *SMALL_NETWORK]
    with pytest.raises(UserError, match=r"was made with model tiny and weights .*, not with descriptors of a file"):
        query(load(QueryConfig, [f"index.path={ours}/index", *shared, f"describe.descriptors={file}"]))
    both = write_npy(tmp_path / "both.npy", database, rows)
    line = [f"database={city}/database", f"output={tmp_path}/i", f"describe.descriptors={both}"]
    build_index(load(BuildIndexConfig, line))
    with pytest.raises(UserError, match="was made with descriptors of a file, not with tiny and weights"):
        query(load(QueryConfig, [f"index.path={tmp_path}/i", *shared]))


@pytest.mark.parametrize("kind", ["flat", pytest.param("ivf_8bit", marks=pytest.mark.soak), "ivf_rabitq"])
def test_wide_descriptors_reduced(city: Path, ours: Path, tmp_path: Path, kind: str) -> None:
    """8,448 values of a random network, reduced, indexed, added to, asked: the distances of a plain computation."""
    (database, own_rows), (queries, own_queries) = described(ours / "index"), described(ours / "queries")
    network = np.random.default_rng(3).normal(size=(own_rows.shape[1], 8448))
    rows, asked = (np.tanh(3 * some @ network).astype(np.float16) for some in (own_rows, own_queries))
    file = write_npy(tmp_path / "both.npy", database + queries, np.concatenate([rows, asked]))
    more = [f"describe.descriptors={file}", "index.reduce_to=24", f"index.kind={kind}", "index.num_shards=2"]
    more += ["index.num_lists=null" if kind == "flat" else "index.num_lists=4", "index.target_recall=0.1"]
    line = [f"database={city}/database", f"output={tmp_path}/index", *more]
    index = build_index(load(BuildIndexConfig, line))
    manifest = open_manifest(index, index)
    assert (manifest.descriptor_dim, manifest.described_dim) == (24, 8448)

    wide = rows.astype(np.float64)
    _, spread, axes = np.linalg.svd(wide - wide.mean(axis=0), full_matrices=False)
    matrix = axes[:24].T / spread[:24]
    plain = [(some.astype(np.float64) - wide.mean(axis=0)) @ matrix for some in (rows, asked)]
    there, here = (some / np.linalg.norm(some, axis=1, keepdims=True) for some in plain)
    line = [f"index.path={index}", f"queries={city}/queries", f"output={tmp_path}/out", f"describe.descriptors={file}"]
    line += ["rerank.num_candidates=3", "index.num_probes=null" if kind == "flat" else "index.num_probes=4"]
    query(load(QueryConfig, [*line, *SMALL_NETWORK]))
    known = read_images(index, manifest)
    table = [row for row in pq.read_table(tmp_path / "out" / "predictions.parquet").to_pylist() if row["candidates"]]
    for query_row, row in zip(here, table, strict=True):
        distances = ((there - query_row) ** 2).sum(axis=1)
        places = [database.index(known.path(i)) for i in row["candidates"]]
        tolerance = 0.1 if kind == "ivf_8bit" else 1e-4
        np.testing.assert_allclose(row["squared_distances"], distances[places], atol=tolerance)
        if kind == "flat":
            np.testing.assert_allclose(np.sort(distances)[:3], distances[places], atol=1e-4)

    if kind == "flat":
        before = (tmp_path / "index" / "generations" / "000001.json").read_bytes()
        replaced = next(path for path in database if path.endswith("@copy1.jpg"))
        (tmp_path / "add.txt").write_text(replaced)
        line = [f"index.path={index}", f"add={tmp_path}/add.txt", f"describe.descriptors={file}"]
        after = update_index(load(UpdateIndexConfig, line))
        added = np.load(tmp_path / "index" / after.shards[-1].files["descriptors.npy"].path)
        same = np.abs(there[[database.index(replaced)]])  # but for the signs of the axes
        np.testing.assert_allclose(np.abs(added), same, atol=1e-4)
        assert (tmp_path / "index" / "generations" / "000001.json").read_bytes() == before
