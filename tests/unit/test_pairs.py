"""Pairs of query and database photo: hloc's text and Parquet, there and back, and what is wrong with a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairvpr.data.manifest import Manifest
from pairvpr.data.pairs import candidates_of, hloc_lines, read_pairs
from pairvpr.errors import UserError

QUERIES = Manifest.of("/photos/queries", ["a.jpg", "b.jpg", "sub/c.jpg"])
DATABASE = Manifest.of("/photos/db", ["a.jpg", "x.jpg", "y.jpg", "z.jpg"])

pair_lists = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, unique=True
)  # ids of a query and of a database photo
scores = st.floats(allow_nan=False, allow_infinity=False)


def read(file: Path) -> dict[int, list[int]]:
    """Candidates by query of a file."""
    found = candidates_of(read_pairs(str(file), "k"), str(file), "k", QUERIES, DATABASE)
    return {query_id: ids.tolist() for query_id, ids in found.items()}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a file of pairs may be written, again and again."""
    return tmp_path_factory.mktemp("pairs") / "pairs"


@given(pairs=pair_lists, data=st.data(), has_scores=st.booleans(), is_parquet=st.booleans(), below=st.booleans())
def test_there_and_back(
    file: Path, pairs: list[tuple[int, int]], data: st.DataObject, has_scores: bool, is_parquet: bool, below: bool
) -> None:
    """As they were, whatever the order of the queries; with scores by them, equal ones as they stand in the file."""
    values = data.draw(st.lists(scores | st.sampled_from([0.0, 1.0]), min_size=len(pairs), max_size=len(pairs)))
    named = [
        (
            ("queries/" if below else "") + QUERIES.path(query_id),
            ("db/" if below else "") + DATABASE.path(image_id),
            *([value] if has_scores else []),
        )
        for (query_id, image_id), value in zip(pairs, values, strict=True)
    ]
    if is_parquet:
        names = ("query", "database", "score")
        pq.write_table(
            pa.table({name: list(column) for name, column in zip(names, zip(*named, strict=True), strict=False)}), file
        )
    else:
        file.write_bytes(hloc_lines(named))  # pyright: ignore[reportArgumentType]
    expected: dict[int, list[tuple[float, int]]] = {}
    for (query_id, image_id), value in zip(pairs, values, strict=True):
        expected.setdefault(query_id, []).append((-value if has_scores else 0.0, image_id))
    assert read(file) == {
        query_id: [image_id for _, image_id in sorted(rows, key=lambda row: row[0])]
        for query_id, rows in expected.items()
    }


def test_hlocs_own_parser_reads_what_we_write(file: Path) -> None:
    """hloc's `parse_retrieval`: a name, a space, a name; and blank lines are nothing to us, as to it."""
    data = hloc_lines([("b.jpg", "x.jpg"), ("b.jpg", "y.jpg"), ("a.jpg", "z.jpg")]).decode()
    parsed = [tuple(line.split(" ")) for line in data.rstrip("\n").split("\n")]
    assert parsed == [("b.jpg", "x.jpg"), ("b.jpg", "y.jpg"), ("a.jpg", "z.jpg")]
    file.write_text("\n" + data.replace("\n", "\r\n\n"))
    assert read(file) == {0: [3], 1: [1, 2]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no pair in it"),
        ("\n \n", "no pair in it"),
        ("a.jpg\n", "line 1: 1 columns; expected lines of `query database`"),
        ("\na.jpg x.jpg\na.jpg y.jpg 3\n", "line 3: 3 columns, the first line has 2"),
        ("a.jpg x.jpg 1 2\n", "line 1: 4 columns"),
        ("a.jpg x.jpg 1\na.jpg y.jpg far\n", "line 2: the score far is not a number"),
        ("a.jpg x.jpg nan\n", "line 1: the score nan is not a number"),
        ("a.jpg x.jpg 1e999\n", "pair 1: its score is not finite"),
        ("q.jpg x.jpg\nr.jpg x.jpg\n", r"the query q.jpg is not below /photos/queries \(nor are 1 more\)"),
        ("a.jpg v.jpg\n", r"the database photo v.jpg is not below /photos/db; expected names"),
        ("a.jpg x.jpg\nb.jpg x.jpg\na.jpg x.jpg\n", "the pair a.jpg x.jpg is there twice"),
        (b"\xff\xfe a.jpg\n", "not UTF-8"),
        (b"PAR1 and then nothing", "not a Parquet file of pairs"),
        (pa.table({"query": ["a.jpg"], "image": ["x.jpg"]}), "its columns are query, image"),
        (pa.table({"query": ["a.jpg", None], "database": ["x.jpg", "y.jpg"]}), "pair 2: no query"),
        (pa.table({"query": ["a.jpg"], "database": ["x.jpg"], "score": ["far"]}), "not a Parquet file of pairs"),
        (pa.table({"query": ["a.jpg"], "database": ["x.jpg"], "score": [np.nan]}), "its score is not finite"),
    ],
)
def test_what_is_wrong_with_a_file(file: Path, content: str | bytes | pa.Table, message: str) -> None:
    if isinstance(content, pa.Table):
        pq.write_table(content, file)
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        read(file)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(file: Path) -> None:
    with pytest.raises(UserError, match=r"k=.*missing\.txt: no such file"):
        read_pairs(str(file.with_name("missing.txt")), "k")
    with pytest.raises(UserError, match="no such file"):
        read_pairs(str(file.parent), "k")


def test_names_with_spaces_are_not_written() -> None:
    with pytest.raises(UserError, match=r"'a b\.jpg': hloc's pairs can't hold a name with white space"):
        hloc_lines([("q.jpg", "a b.jpg")])
