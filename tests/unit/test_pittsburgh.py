"""Pittsburgh: photos and positions of a MATLAB struct, in the order of its lists."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from pairvpr.config.benchmark_schema import PittsburghConfig
from pairvpr.data.benchmarks import load_benchmark, read_benchmark
from pairvpr.data.benchmarks.pittsburgh import read_db_struct
from pairvpr.data.manifest import Benchmark
from pairvpr.data.positives import within_radius
from pairvpr.data.problems import Problems
from pairvpr.errors import UserError
from tests.support.shared import SHARED, needs_shared

DATABASE = ["001/b.jpg", "000/a_pitch1_yaw1.jpg", "000/a_pitch2_yaw12.jpg"]
QUERIES = ["001/x.jpg", "000/y.jpg"]
UTM_DATABASE = [[585_000.0, 585_025.0, 585_025.1], [4_477_000.0, 4_477_000.0, 4_477_000.0]]
UTM_QUERIES = [[585_000.0, 590_000.0], [4_477_000.0, 4_477_000.0]]


def cells(names: list[Any]) -> np.ndarray[Any, Any]:
    column = np.empty((len(names), 1), object)
    column[:, 0] = names
    return column


def struct(**changes: Any) -> dict[str, Any]:
    """dbStruct as NetVLAD's authors publish it."""
    fields = {
        "whichSet": "test",
        "dbImageFns": cells(DATABASE),
        "utmDb": np.array(UTM_DATABASE),
        "qImageFns": cells(QUERIES),
        "utmQ": np.array(UTM_QUERIES),
        "numImages": 3.0,
        "numQueries": 2.0,
        "posDistThr": 25.0,
        "posDistSqThr": 625.0,
        "nonTrivPosDistSqThr": 100.0,
    }
    return {name: value for name, value in (fields | changes).items() if value is not None}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder, names in (("", DATABASE), ("queries_real", QUERIES), ("", ["002/not_listed.jpg"])):
        for name in names:
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).touch()
    (tmp_path / "datasets").mkdir()
    savemat(tmp_path / "datasets" / "list.mat", {"dbStruct": struct()})
    return tmp_path


def config(root: Path) -> PittsburghConfig:
    return PittsburghConfig(name="pitts", root=str(root), db_struct=f"{root}/datasets/list.mat")


def load(root: Path, **changes: Any) -> Benchmark:
    if changes:
        savemat(root / "datasets" / "list.mat", {"dbStruct": struct(**changes)})
    return load_benchmark(config(root), "unused")


def test_photos_keep_the_order_of_the_list(root: Path) -> None:
    benchmark = load(root)
    assert benchmark.database.paths == DATABASE
    assert benchmark.queries.paths == QUERIES
    assert benchmark.queries.url(0) == f"{root}/queries_real/001/x.jpg"
    assert benchmark.database.utm_m.tolist() == np.array(UTM_DATABASE).T.tolist()
    assert benchmark.positives is not None
    assert [ids.tolist() for ids in benchmark.positives] == [[0, 1], []]
    assert benchmark.protocol == {"positives": "radius", "radius_m": 25.0}
    stamp = benchmark.stamp()
    assert (stamp["num_queries_without_positives"], stamp["queries_without_positives"]) == (1, "count as a miss")


def test_a_list_of_one_photo(root: Path) -> None:
    benchmark = load(root, qImageFns=cells(["000/y.jpg"]), utmQ=np.array([[585_000.0], [4_477_000.0]]))
    assert benchmark.queries.paths == ["000/y.jpg"]


def test_compressed_files_and_rows_instead_of_columns(root: Path) -> None:
    fields = struct(dbImageFns=cells(DATABASE).T)
    savemat(root / "datasets" / "list.mat", {"other": 1.0, "dbStruct": fields}, do_compression=True)
    assert load(root).database.paths == DATABASE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"utmQ": None}, "no utmQ in dbStruct; expected dbImageFns, utmDb, qImageFns, utmQ"),
        (
            {"utmDb": np.array(UTM_DATABASE)[:, :2]},
            "utmDb of dbStruct is 2 x 2; expected 2 x 3, one column for each of",
        ),
        ({"utmDb": np.array(UTM_DATABASE).T}, "utmDb of dbStruct is 3 x 2; expected 2 x 3"),
        ({"utmDb": "north"}, "dbStruct.dbImageFns holds no names, or dbStruct.utmDb no numbers"),
        ({"dbImageFns": cells(["a.jpg", np.zeros(2), "b.jpg"])}, "dbStruct.dbImageFns holds no names"),
        ({"dbImageFns": "a.jpg"}, "utmDb of dbStruct is 2 x 3; expected 2 x 1"),
    ],
)
def test_a_struct_that_is_not_dbstruct_is_refused(root: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(root, **changes)
    assert str(caught.value).startswith(f"{root}/datasets/list.mat: {message}")


@pytest.mark.parametrize("content", [b"", b"hello", bytes(range(256)) * 4, None])
def test_what_is_no_matlab_file_is_refused(root: Path, content: bytes | None) -> None:
    file = root / "datasets" / "list.mat"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if content is None else content)
    with pytest.raises(UserError, match=r"list\.mat: (not a MATLAB file, or a damaged one|no dbImageFns)") as caught:
        load(root)
    assert "\n" not in str(caught.value)


def test_names_are_found_by_the_rule_of_tables(root: Path) -> None:
    """A list of another system: `./` in front, another form of Unicode, another case of the ending, backslashes."""
    (root / "002" / unicodedata.normalize("NFD", "zürich.JPG")).touch()
    names = ["./001/b.jpg", unicodedata.normalize("NFC", "002/zürich.jpg"), "000\\a_pitch2_yaw12.jpg"]
    found = load(root, dbImageFns=cells(names)).database.paths
    assert [unicodedata.normalize("NFC", path) for path in found] == [
        "001/b.jpg",
        "002/zürich.JPG",
        "000/a_pitch2_yaw12.jpg",
    ]
    assert all((root / path).exists() for path in found)
    (root / "001" / "b.JPG").touch()
    with pytest.raises(UserError, match=r"'001/b\.Jpg' could be several photos in"):
        load(root, dbImageFns=cells(["001/b.Jpg", *names[1:]]))


def test_missing_files_are_named_by_their_settings(root: Path) -> None:
    (root / "datasets" / "list.mat").unlink()
    with pytest.raises(UserError, match=r"^benchmark\.db_struct=.*list\.mat: no such file; expected a MATLAB file"):
        load(root)
    savemat(root / "list.mat", {"dbStruct": struct()})
    elsewhere = PittsburghConfig(name="p", root=f"{root}/nowhere", db_struct=f"{root}/list.mat")
    with pytest.raises(UserError, match=r"^benchmark\.root=.*nowhere: nothing there; expected the folders 000/ and"):
        load_benchmark(elsewhere, "unused")


def test_a_matlab_file_without_the_struct(root: Path) -> None:
    savemat(root / "datasets" / "list.mat", {"something": 1.0})
    with pytest.raises(UserError, match=r"list\.mat: no dbImageFns, utmDb, qImageFns, utmQ in dbStruct"):
        load(root)


def test_all_that_is_wrong_with_rows_is_found(root: Path) -> None:
    names = cells(["001/b.jpg", "000/gone.jpg", "001/b.jpg"])
    utm_q = np.array([[np.nan, 590_000.0], [4_477_000.0, 4_477_000.0]])
    savemat(root / "datasets" / "list.mat", {"dbStruct": struct(dbImageFns=names, utmQ=utm_q)})
    problems = Problems()
    benchmark = read_benchmark(config(root), "", problems)
    mat = f"{root}/datasets/list.mat"
    assert problems.lines == [
        f"{mat}, dbImageFns row 2: no photo '000/gone.jpg' in {root}",
        f"{mat}, dbImageFns row 3: 001/b.jpg again, as in {mat}, dbImageFns row 1; expected each photo once",
        f"{mat}, qImageFns row 1: 001/x.jpg has the position [nan, 4477000.0]; expected numbers",
    ]
    assert (benchmark.database.paths, benchmark.queries.paths) == (["001/b.jpg"], ["000/y.jpg"])
    with pytest.raises(UserError, match=r"'000/gone\.jpg' in .* \(and 2 more; pairvpr check_benchmark lists them\)"):
        load(root)


@needs_shared
def test_the_whole_30k_test_list(tmp_path: Path) -> None:
    """Through a MATLAB file and back, then positives by brute force: every query has one."""
    with np.load(SHARED / "data" / "pitts30k_test_positions.npz") as arrays:
        queries_utm_m, database_utm_m = arrays["utmQ"], arrays["utmDb"]
    fields = {
        "dbImageFns": cells([f"{i // 1000:03d}/{i:06d}.jpg" for i in range(len(database_utm_m))]),
        "utmDb": database_utm_m.T,
        "qImageFns": cells([f"{i // 1000:03d}/{i:06d}.jpg" for i in range(len(queries_utm_m))]),
        "utmQ": queries_utm_m.T,
    }
    savemat(tmp_path / "pitts30k_test.mat", {"dbStruct": struct(**fields)})
    listed = read_db_struct(f"{tmp_path}/pitts30k_test.mat")
    assert (len(listed["queries"].names), len(listed["database"].names)) == (6_816, 10_000)
    assert listed["queries"].names[6_815] == "006/006815.jpg"
    np.testing.assert_array_equal(listed["database"].utm_m, database_utm_m)
    found = within_radius(listed["queries"].utm_m, listed["database"].utm_m, 25.0)
    assert min(len(ids) for ids in found) > 0
    for query in range(0, 6_816, 97):
        squared = ((database_utm_m - queries_utm_m[query]) ** 2).sum(axis=1)
        assert found[query].tolist() == np.flatnonzero(squared <= 625.0).tolist()
