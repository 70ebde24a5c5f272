"""Every public benchmark, in miniature and by its name: from `datasets_root` through the single-machine pipeline."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pairvpr.config.compose import load, load_evaluations
from pairvpr.config.schema import CheckBenchmarkConfig
from pairvpr.data import storage
from pairvpr.data.benchmarks import load_benchmark
from pairvpr.data.manifest import Benchmark, Manifest
from pairvpr.errors import UserError
from pairvpr.evaluation.recall import recall_at
from pairvpr.evaluation.report import RunFacts, metrics, summary
from pairvpr.models.pair_vpr import PairVPR
from pairvpr.retrieval import pipeline
from pairvpr.toy.benchmarks import write_benchmarks
from tests.support.small import PUBLIC, shaken_model, small_evaluate_config

pytestmark = pytest.mark.slow

# Queries, database photos, and the positives of the first and the last query; 4 places of each benchmark.
PLAIN = (4, 8, [0, 1], [6, 7])
EXPECTED: dict[str, tuple[int, int, list[int] | None, list[int] | None]] = {
    "msls_val": (8, 16, [0, 1], [14, 15]),
    "msls_test": (30, 48, None, None),
    "nordland_2760": (3, 22, [0, 1], [19, 20, 21]),
    "nordland_27592": (24, 24, list(range(11)), list(range(13, 24))),
    "pitts250k_test": (8, 16, [0, 1], [14, 15]),
    "tokyo247": (4, 12, [0, 4, 8], [3, 7, 11]),
}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The pipeline sets torch's threads; other tests get theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `datasets_root`."""
    folder = tmp_path_factory.mktemp("datasets")
    write_benchmarks(str(folder))
    return folder


@pytest.fixture(scope="module")
def model() -> PairVPR:
    """The small network, its weights shaken so that photos differ."""
    return shaken_model()


def benchmark_of(root: Path | str, name: str) -> Benchmark:
    config = load(CheckBenchmarkConfig, [f"benchmark={name}", f"datasets_root={root}"])
    return load_benchmark(config.benchmark, "unused")


@pytest.mark.parametrize("name", PUBLIC)
def test_a_miniature_goes_through_the_pipeline(root: Path, model: PairVPR, name: str) -> None:
    benchmark = benchmark_of(root, name)
    num_queries, num_database, first, last = EXPECTED.get(name, PLAIN)
    assert (benchmark.name, len(benchmark.queries), len(benchmark.database)) == (name, num_queries, num_database)
    answers = pipeline.run(benchmark, model, small_evaluate_config("unused", num_candidates=4, num_retrieved=100))
    assert [sorted(answer.candidates.tolist()) for answer in answers] == [list(range(num_database))] * num_queries
    assert [len(answer.reranked) for answer in answers] == [4] * num_queries
    if first is None or last is None:
        assert benchmark.positives is None
        return
    assert benchmark.positives is not None
    assert (benchmark.positives[0].tolist(), benchmark.positives[-1].tolist()) == (first, last)
    recalls = recall_at([answer.candidates for answer in answers], benchmark.positives, [1, num_database])
    assert recalls[num_database] == 100.0
    hits = [answer.candidates[0] in ids for answer, ids in zip(answers, benchmark.positives, strict=True)]
    assert recalls[1] == pytest.approx(100.0 * np.mean(hits))


def test_msls_val_is_reported_by_city(root: Path, model: PairVPR) -> None:
    benchmark, config = benchmark_of(root, "msls_val"), small_evaluate_config("unused", num_candidates=4)
    answers = pipeline.run(benchmark, model, config)
    facts = RunFacts(
        index={"kind": "flat"},
        weights_sha256="ab" * 32,
        untrained=True,
        num_candidates=4,
        seconds_describe=0.0,
        seconds_retrieve=0.0,
        seconds_rerank=0.0,
        num_rejected_database=0,
        num_rejected_queries=0,
    )
    content = metrics(benchmark, answers, config.model, facts)
    protocol, audit = content["protocol"], content["audit"]
    assert (protocol["num_queries"], protocol["num_queries_dropped"], protocol["cities"]) == (8, 2, ["cph", "sf"])
    assert {city: group["num_queries"] for city, group in audit["by_group"].items()} == {"cph": 4, "sf": 4}
    for city, group in audit["by_group"].items():
        right = [
            [ids[0] // 8 == (city == "sf") and (ids[0] % 8) // 2 == answer.query_id % 4 for ids in rankings]
            for answer in answers
            for rankings in [(answer.candidates, answer.reranked)]
            if benchmark.queries.path(answer.query_id).startswith(f"{city}/")
        ]
        row = group["by_num_candidates"]["4"]
        assert row["reranked"]["1"] == pytest.approx(100 * np.mean([after for _, after in right]))
        assert row["corrected"] == sum(after and not before for before, after in right)
        assert row["broken"] == sum(before and not after for before, after in right)
    assert "2 further queries without a positive are dropped" in summary(content)


def place(photos: Manifest, image_id: int) -> int:
    """The place that is drawn, which the toy city writes into the names of its photos."""
    found = re.search(r"s\d{6}p(\d{6})d", photos.path(image_id))
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize("name", [name for name in PUBLIC if not name.startswith(("msls", "nordland", "pitts"))])
def test_positives_are_the_photos_of_the_place(root: Path, name: str) -> None:
    benchmark = benchmark_of(root, name)
    assert benchmark.positives is not None
    for query_id, ids in enumerate(benchmark.positives):
        here = place(benchmark.queries, query_id)
        same = [i for i in range(len(benchmark.database)) if place(benchmark.database, i) == here]
        assert ids.tolist() == same
        assert len(same) > 0


def test_a_tokyo_query_has_positives_in_several_folders(root: Path) -> None:
    benchmark = benchmark_of(root, "tokyo247")
    assert benchmark.positives is not None
    for ids in benchmark.positives:
        assert [benchmark.database.path(i).split("/")[0] for i in ids] == ["03800", "03801", "03802"]


def test_sfxl_shares_one_database(root: Path) -> None:
    four = [benchmark_of(root, name) for name in PUBLIC if name.startswith("sfxl_")]
    assert {(one.database.root, one.database.paths_sha256) for one in four} == {
        (f"{root}/sf_xl/test/database", four[0].database.paths_sha256)
    }
    assert len({one.queries.paths_sha256 for one in four}) == 4


def test_svox_selects_its_queries(root: Path) -> None:
    six = {name: benchmark_of(root, name) for name in PUBLIC if name.startswith("svox")}
    folders = {name: one.queries.root.removeprefix(f"{root}/svox/images/test/") for name, one in six.items()}
    assert folders == {name: name.replace("svox", "queries") for name in six}
    assert {one.database.root for one in six.values()} == {f"{root}/svox/images/test/gallery"}


def test_lists_of_pittsburgh_are_parts_of_one_download(root: Path) -> None:
    val, test, both = (benchmark_of(root, name) for name in ("pitts30k_val", "pitts30k_test", "pitts250k_test"))
    assert val.database.paths + test.database.paths == both.database.paths
    assert val.queries.paths + test.queries.paths == both.queries.paths
    assert both.queries.paths[0] == "000/000000_pitch1_yaw1.jpg"
    assert both.queries.root == f"{root}/pittsburgh/queries_real"


def test_no_two_benchmarks_have_one_stamp(root: Path) -> None:
    stamps = {name: benchmark_of(root, name).stamp() for name in PUBLIC}
    # The other miniatures show the same photos under the same names.
    others = [
        json.dumps(stamps[name], sort_keys=True) for name in PUBLIC if name[:4] in ("msls", "nord", "pitt", "sfxl")
    ]
    assert len(set(others)) == len(others) == 11
    assert (stamps["nordland_2760"]["tolerance_frames"], stamps["nordland_27592"]["tolerance_frames"]) == (1, 10)
    assert "tolerance_frames" not in stamps["sped"]
    rules = {name: stamp["queries_without_positives"] for name, stamp in stamps.items()}
    assert (rules.pop("msls_val"), rules.pop("msls_test")) == ("dropped", None)
    assert set(rules.values()) == {"count as a miss"}
    assert {stamp["exif_rotation"] for stamp in stamps.values()} == {"applied"}


def test_one_line_loads_several(root: Path) -> None:
    line = [
        "benchmarks=[msls_val,tokyo247,nordland_2760]",
        f"datasets_root={root}",
        "output=/o",
        "benchmark.radius_m=5",
    ]
    configs = load_evaluations([*line, "benchmark.tolerance_frames=0"])
    loaded = [load_benchmark(config.benchmark, "unused") for config in configs]
    assert [one.protocol["radius_m"] for one in loaded] == [5.0, 5.0, None]
    assert loaded[2].positives is not None
    assert [ids.tolist() for ids in loaded[2].positives] == [[0], [10], [20]]


@pytest.mark.parametrize("name", ["msls_val", "nordland_2760", "pitts30k_test", "tokyo247"])
def test_downloads_may_lie_in_a_store(root: Path, name: str) -> None:
    folder = {"msls_val": "msls", "nordland_2760": "nordland", "pitts30k_test": "pittsburgh", "tokyo247": "tokyo247"}
    for path in storage.list_files(f"{root}/{folder[name]}"):
        storage.write_bytes(f"memory://data/{folder[name]}/{path}", (root / folder[name] / path).read_bytes())
    here, there = benchmark_of(root, name), benchmark_of("memory://data/", name)
    assert there.stamp() == here.stamp()
    assert there.queries.url(0).startswith("memory://data/")
    storage.remove_tree("memory://data")


def test_a_public_benchmark_that_is_not_there(tmp_path: Path) -> None:
    for name in ("msls_test", "nordland_27592", "pitts30k_val", "sfxl_night"):
        with pytest.raises(UserError, match=r"^benchmark\.(root|database|db_struct)=.*: (it has )?no") as caught:
            benchmark_of(tmp_path, name)
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_miniatures_keep_off_the_streets_of_training_sets(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected 0 to 999, because training sets show the streets of larger ones"):
        write_benchmarks(str(tmp_path), seed=999)
    assert list(tmp_path.iterdir()) == []


def with_keys(root: Path | str, name: str, *keys: str) -> Benchmark:
    config = load(CheckBenchmarkConfig, [f"benchmark={name}", f"datasets_root={root}", *keys])
    return load_benchmark(config.benchmark, "unused")


@pytest.mark.parametrize("name", PUBLIC)
def test_any_layout_takes_a_truth_from_files(root: Path, tmp_path: Path, name: str) -> None:
    """Random pairs, and random places: matches equal the file's, and those of every distance counted by hand."""
    rng = np.random.default_rng(len(name))
    plain = benchmark_of(root, name)
    is_folders = not name.startswith(("msls", "nordland", "pitts"))
    pairs = sorted({(int(q), int(d)) for q, d in rng.integers(0, (len(plain.queries), len(plain.database)), (20, 2))})
    file = tmp_path / "pairs.csv"
    rows = [f"{plain.queries.path(query)},{plain.database.path(image_id)}" for query, image_id in pairs]
    file.write_text("\n".join(["query,database", *rng.permutation(rows)]))
    listed = with_keys(root, name, f"benchmark.positives={file}", *["benchmark.radius_m=null"] * is_folders)
    found = [(query, int(i)) for query, ids in enumerate(listed.positives or []) for i in ids]
    assert [(listed.queries.path(query), i) for query, i in found] == [(plain.queries.path(q), i) for q, i in pairs]

    places, keys = {}, ["benchmark.positions=table"] * is_folders
    for part, photos in (("database", plain.database), ("queries", plain.queries)):
        places[part] = 500_000 + rng.uniform(0, 60, (len(photos), 2)).round(3)
        rows = [f"{path},{e},{n}" for path, (e, n) in zip(photos.paths, places[part].tolist(), strict=True)]
        (tmp_path / f"{part}.csv").write_text("\n".join(["path,utm_east,utm_north", *rng.permutation(rows)]))
        keys.append(f"benchmark.{part}_table={tmp_path}/{part}.csv")
    if name == "msls_val":
        return  # its 25 m drop queries, which the tests of MSLS look at
    placed = with_keys(root, name, *keys)
    assert np.array_equal(placed.database.utm_m, places["database"])
    assert np.array_equal(placed.queries.utm_m, places["queries"])
    near = np.hypot(*(places["queries"][:, None] - places["database"]).transpose(2, 0, 1)) <= 25
    if name == "msls_test":
        city = [np.array([path.split("/")[0] for path in its.paths]) for its in (placed.queries, placed.database)]
        near &= city[0][:, None] == city[1]
    expected = plain.positives if name.startswith("nordland") else [np.flatnonzero(row) for row in near]
    assert placed.positives is not None
    assert expected is not None
    assert [ids.tolist() for ids in placed.positives] == [ids.tolist() for ids in expected]
