"""Sealed files: read back as they were written; any byte that changed is found and named."""

from __future__ import annotations

import io
import json
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pairvpr.data import sealed, storage
from pairvpr.data.sealed import DamagedFileError
from pairvpr.errors import UserError

SCHEMA = pa.schema([("query_id", pa.int64()), ("ids", pa.list_(pa.int64()))])
TABLE = pa.table({"query_id": [1, 2], "ids": [[3], [4, 5]]}, schema=SCHEMA).replace_schema_metadata({"seconds": "1.5"})
CONTENT = {"name": "straße", "nested": {"values": [1, 2.5, None]}}
REMEDY = "delete it and run the same line again"


@dataclass(frozen=True)
class Inner:
    path: str
    size: int


@dataclass(frozen=True)
class Outer:
    first: int
    share: float
    names: dict[int, str]
    inner: list[Inner]
    last: Inner | None
    anything: Any


GOOD: dict[str, Any] = {
    "first": 3,
    "share": 1,
    "names": {"7": "x"},
    "inner": [{"path": "a", "size": 0}],
    "last": None,
    "anything": [{}],
}


def test_json_comes_back_and_ends_with_its_seal(tmp_path: Path) -> None:
    url = str(tmp_path / "file.json")
    sealed.write_json(url, CONTENT)
    assert sealed.read_json(url, REMEDY) == CONTENT
    content = json.loads((tmp_path / "file.json").read_text())
    assert list(content) == [*CONTENT, "seal"]
    assert sealed.json_bytes(CONTENT) == (tmp_path / "file.json").read_bytes()


def test_parquet_comes_back_with_its_metadata(tmp_path: Path) -> None:
    url = str(tmp_path / "file.parquet")
    sealed.write_parquet(url, TABLE)
    table = sealed.read_parquet(url, SCHEMA, REMEDY)
    assert table is not None
    assert table.equals(TABLE)
    assert table.schema.metadata == {b"seconds": b"1.5"}
    assert pq.read_table(url).equals(TABLE)
    assert sealed.parquet_bytes(TABLE) == (tmp_path / "file.parquet").read_bytes()


def seal_archive(path: Path) -> None:
    with path.open("r+b") as file:
        sealed.seal_archive(file)


def test_an_archive_of_torch_and_of_numpy_keeps_its_content(tmp_path: Path) -> None:
    torch.save({"weights": torch.ones(3)}, tmp_path / "file.pt")
    np.savez(tmp_path / "file.npz", rows=np.arange(5))
    for name in ("file.pt", "file.npz"):
        seal_archive(tmp_path / name)
        with (tmp_path / name).open("rb") as file:
            sealed.check_archive(file, name, REMEDY)
            assert file.tell() == 0
    assert torch.load(tmp_path / "file.pt", weights_only=True)["weights"].tolist() == [1, 1, 1]
    assert np.load(tmp_path / "file.npz")["rows"].tolist() == [0, 1, 2, 3, 4]


def test_a_file_of_earlier_versions_has_no_seal_and_is_read(tmp_path: Path) -> None:
    storage.write_json(str(tmp_path / "file.json"), CONTENT)
    assert sealed.read_json(str(tmp_path / "file.json"), REMEDY) == CONTENT
    pq.write_table(TABLE, tmp_path / "file.parquet")
    table = sealed.read_parquet(str(tmp_path / "file.parquet"), SCHEMA, REMEDY)
    assert table is not None
    assert table.equals(TABLE)
    torch.save({}, tmp_path / "file.pt")
    with (tmp_path / "file.pt").open("rb") as file:
        sealed.check_archive(file, "file.pt", REMEDY)


def test_what_is_not_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for url in (str(tmp_path / "nothing"), str(tmp_path / "file" / "below"), "memory://nothing/at/all"):
        assert sealed.read_json(url, REMEDY) is None
        assert sealed.read_parquet(url, SCHEMA, REMEDY) is None


def _read_archive(data: bytes) -> object:
    file = io.BytesIO(data)
    sealed.check_archive(file, "file", REMEDY)
    try:
        return torch.load(file, weights_only=True)["weights"].tolist()
    except Exception as error:
        raise UserError("what the reader of checkpoints makes of it") from error


def _archive(tmp_path: Path) -> bytes:
    torch.save({"weights": torch.arange(50)}, tmp_path / "file.pt")
    seal_archive(tmp_path / "file.pt")
    return (tmp_path / "file.pt").read_bytes()


def _damaged(data: bytes, rng: random.Random) -> bytes:
    """The bytes with a bit flipped, a range zeroed, a range lost, or the end."""
    kind, first = rng.randrange(4), rng.randrange(len(data))
    stop = min(len(data), first + rng.choice((1, 7, 64, 500)))
    if kind == 0:
        return data[:first] + bytes([data[first] ^ 1 << rng.randrange(8)]) + data[first + 1 :]
    if kind == 1:
        return data[:first] + bytes(stop - first) + data[stop:]
    return data[:first] if kind == 2 else data[:first] + data[stop:]


@pytest.mark.parametrize("kind", ["json", "parquet", "archive"])
@pytest.mark.parametrize("num_files", [300, pytest.param(20_000, marks=pytest.mark.soak)])
def test_a_damaged_file_is_named_or_its_content_is_unchanged(tmp_path: Path, kind: str, num_files: int) -> None:
    read: Callable[[bytes], object] = {
        "json": lambda data: sealed.parse_json(data, "file", REMEDY),
        "parquet": lambda data: sealed.parse_parquet(data, "file", SCHEMA, REMEDY).to_pylist(),
        "archive": _read_archive,
    }[kind]
    whole = {
        "json": lambda: sealed.json_bytes(CONTENT),
        "parquet": lambda: sealed.parquet_bytes(TABLE),
        "archive": lambda: _archive(tmp_path),
    }[kind]()
    expected, rng, num_named = read(whole), random.Random(0), 0
    for _ in range(num_files):
        try:
            assert read(_damaged(whole, rng)) == expected
        except UserError:
            num_named += 1
    assert num_named > 0.9 * num_files


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"7", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b'{"seal": "x"}']
)
def test_what_is_no_object_is_named_in_one_line(data: bytes) -> None:
    with pytest.raises(DamagedFileError, match=f"^file is damaged: .*; {REMEDY}$") as raised:
        sealed.parse_json(data, "file", REMEDY)
    assert "\n" not in str(raised.value)


def test_an_error_travels_between_processes() -> None:
    error = DamagedFileError("file", "what", REMEDY)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (DamagedFileError, str(error))


def test_other_columns_and_types_are_named() -> None:
    for table in (TABLE.drop_columns(["ids"]), TABLE.set_column(1, "ids", pa.array(["a", "b"]))):
        with pytest.raises(DamagedFileError, match=r"^file is damaged"):
            sealed.parse_parquet(sealed.parquet_bytes(table), "file", SCHEMA, REMEDY)


def test_a_footer_that_claims_too_many_rows_allocates_nothing() -> None:
    metadata = pq.ParquetFile(io.BytesIO(sealed.parquet_bytes(TABLE))).metadata
    sealed._check_size(metadata, 10_000)
    with pytest.raises(ValueError, match="2 rows in 1 bytes"):
        sealed._check_size(metadata, 1)


def test_objects_of_a_type() -> None:
    found = sealed.parsed(Outer, GOOD, "file", REMEDY)
    assert found == Outer(3, 1.0, {7: "x"}, [Inner("a", 0)], None, [{}])


NEVER = [-1, True, "x", 1 << 70, 10**400, float("nan"), [1], {"a": 1}]


@given(key=st.sampled_from(sorted(GOOD)), value=st.sampled_from(NEVER))
def test_another_type_is_named_and_never_a_traceback(key: str, value: object) -> None:
    try:
        sealed.parsed(Outer, GOOD | {key: value}, "file", REMEDY)
    except DamagedFileError:
        return
    assert key == "anything" or (key == "share" and type(value) is int)
