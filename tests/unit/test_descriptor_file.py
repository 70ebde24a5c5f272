"""Files of descriptors: rows in any order and number of pieces, and what is wrong with a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pairvpr.config.compose import load
from pairvpr.config.schema import PlanConfig
from pairvpr.data import descriptor_file
from pairvpr.data.descriptor_file import WIDEST, check_photos_of_file, open_descriptors, read_rows
from pairvpr.data.manifest import Manifest
from pairvpr.errors import UserError
from pairvpr.index import descriptor_shards
from ray_jobs import plan as plan_job


def write(file: Path, rows: NDArray[Any], paths: list[str], kind: str, row_group_size: int = 3) -> str:
    """A file of descriptors of one kind; its name."""
    if kind == "npy":
        np.save(file.with_suffix(".npy"), rows)
        file.with_suffix(".txt").write_text("".join(f"{path}\n" for path in paths))
        return str(file.with_suffix(".npy"))
    values = pa.array(rows.ravel())
    if kind == "fixed":
        lists: pa.Array = pa.FixedSizeListArray.from_arrays(values, rows.shape[1])
    else:
        lists = pa.ListArray.from_arrays(np.arange(len(rows) + 1) * rows.shape[1], values)
    table = pa.table({"path": pa.array(paths, pa.string()), "descriptor": lists})
    pq.write_table(table, file.with_suffix(".parquet"), row_group_size=row_group_size)
    return str(file.with_suffix(".parquet"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where files may be written, again and again."""
    return tmp_path_factory.mktemp("rows")


@pytest.mark.slow
@given(
    kind=st.sampled_from(["npy", "list", "fixed"]),
    dtype=st.sampled_from([np.float16, np.float32]),
    num_rows=st.integers(1, 20),
    width=st.integers(1, 5),
    row_group_size=st.integers(1, 8),
    data=st.data(),
)
def test_a_shard_of_any_rows_in_pieces_has_the_bytes_of_one_written_at_once(
    folder: Path, kind: str, dtype: type, num_rows: int, width: int, row_group_size: int, data: st.DataObject
) -> None:
    rows = np.random.default_rng(num_rows).normal(size=(num_rows, width)).astype(dtype)
    paths = [f"{i}.jpg" for i in range(num_rows)]
    url = write(folder / "rows", rows, paths, kind, row_group_size)
    wanted = np.array(data.draw(st.lists(st.integers(0, num_rows - 1), unique=True)), np.int64)
    file = open_descriptors(url, "k")
    assert (file.width, file.paths.to_pylist()) == (width, paths)
    ids, there, about = np.arange(len(wanted)), rows[wanted].astype(np.float32), {"first_id": 0, "count": len(wanted)}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(descriptor_file, "BYTES_AT_ONCE", data.draw(st.integers(1, 8 * width)))
        pieces = read_rows(url, width, wanted)
        made = descriptor_shards.write_shard_rows(str(folder), 0, ids, width, pieces, rejected={}, **about)
    expected = descriptor_shards.write_shard_description(str(folder), 1, ids, there, rejected={}, seconds=0.0, **about)
    assert [file.sha256 for file in made.files.values()] == [file.sha256 for file in expected.files.values()]


ROWS = np.arange(12, dtype=np.float32).reshape(4, 3)
PATHS = ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]


@pytest.mark.parametrize(
    ("rows", "paths", "kind", "message"),
    [
        (ROWS, PATHS[:3], "npy", "4 rows, and 3 paths on 3 lines"),
        (ROWS, [*PATHS[:3], ""], "npy", "4 rows, and 3 paths on 4 lines"),
        (ROWS, [*PATHS[:3], "a.jpg"], "npy", "the path a.jpg is there twice"),
        (ROWS, [*PATHS[:3], "a.jpg"], "list", "the path a.jpg is there twice"),
        (ROWS.astype(np.float64), PATHS, "npy", r"an array \(4, 3\) of float64; expected"),
        (ROWS.astype(np.float64), PATHS, "fixed", "expected lists of float16 or float32"),
        (np.asfortranarray(ROWS), PATHS, "npy", "in Fortran order"),
        (ROWS[0], PATHS[:3], "npy", r"an array \(3,\) of float32"),
        (ROWS[:0], [], "npy", "0 rows of 3 values"),
        (ROWS[:0], [], "list", "0 rows of 0 values"),
        (np.zeros((1, WIDEST + 1), np.float16), ["a.jpg"], "npy", "1 rows of 16385 values; expected rows of 1 to"),
    ],
)
def test_what_is_wrong_with_a_file(
    tmp_path: Path, rows: NDArray[Any], paths: list[str], kind: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        open_descriptors(write(tmp_path / "rows", rows, paths, kind), "describe.descriptors")
    assert str(error.value).startswith("describe.descriptors=")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["npy", "list"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_file_that_was_cut_short(tmp_path: Path, kind: str, share: float) -> None:
    file = Path(write(tmp_path / "rows", np.tile(ROWS, (50, 1)), [f"{i}.jpg" for i in range(200)], kind))
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(UserError, match=r"cut short|not a \.npy file|not a whole Parquet file") as error:
        open_descriptors(str(file), "k")
    assert "\n" not in str(error.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"k=missing\.npy: no such file"):
        open_descriptors("missing.npy", "k")
    np.save(tmp_path / "rows.npy", ROWS)
    with pytest.raises(UserError, match=r"no list of paths beside it; expected .*rows\.txt"):
        open_descriptors(str(tmp_path / "rows.npy"), "k")
    pq.write_table(pa.table({"path": PATHS}), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="its columns are path; expected"):
        open_descriptors(str(tmp_path / "rows.parquet"), "k")


@pytest.mark.parametrize(
    ("descriptors", "message"),
    [
        ([[1.0, 2.0], [1.0]], "row 2: 1 values, the first row has 2"),
        ([[1.0, 2.0], None], "row 2: 0 values, the first row has 2"),
        ([[1.0, 2.0], [1.0, float("nan")]], "row 2: NaN or infinite numbers"),
        ([[1.0, 2.0], [1.0, None]], "row 2: NaN or infinite numbers"),
        ([[1.0, float("-inf")], [1.0, 2.0]], "row 1: NaN or infinite numbers"),
    ],
)
def test_what_is_wrong_with_a_row(tmp_path: Path, descriptors: list[list[float] | None], message: str) -> None:
    url = str(tmp_path / "rows.parquet")
    pq.write_table(pa.table({"path": PATHS[:2], "descriptor": pa.array(descriptors, pa.list_(pa.float32()))}), url)
    file = open_descriptors(url, "k")
    with pytest.raises(UserError, match=message):
        list(read_rows(url, file.width, np.array([1, 0])))


def test_rows_and_photos_that_do_not_meet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = open_descriptors(write(tmp_path / "rows", ROWS, PATHS, "npy"), "k")
    database, queries = Manifest.of("/db", ["a.jpg", "x.jpg", "y.jpg"]), Manifest.of("/q", ["b.jpg"])
    check_photos_of_file(file, {"database": database, "query": queries}, "k")
    said = capsys.readouterr().err
    assert "2 of 3 database photos have no row and are left out, the first is x.jpg" in said
    assert "2 of 4 rows are of no photo here, the first is c.jpg" in said
    with pytest.raises(UserError, match=r"a\.jpg is the path of a database photo and of a query photo"):
        check_photos_of_file(file, {"database": database, "query": Manifest.of("/q", ["a.jpg"])}, "k")
    with pytest.raises(UserError, match=r"none of the 1 query photos has a row: the first photo is z\.jpg"):
        check_photos_of_file(file, {"query": Manifest.of("/q", ["z.jpg"])}, "k")


def test_plan_takes_the_width_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is described, so no speed is measured and Ray does not start."""
    monkeypatch.setattr(plan_job, "ray_session", lambda _: pytest.fail("Ray was started"))
    url = write(tmp_path / "rows", ROWS, PATHS, "npy")
    line = ["plan.num_images=1000", "model=vitb", f"describe.descriptors={url}", "index.memory_budget_gib=1"]
    content = plan_job.plan(load(PlanConfig, line))
    assert (content["descriptor_dim"], content["descriptors_bytes"]) == (3, 1000 * 3 * 4)
    assert content["hours"] is None
