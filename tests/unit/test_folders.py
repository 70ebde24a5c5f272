"""Layout `folders`: two folders of photos and the three ways to say who shows the same place."""

from __future__ import annotations

from pathlib import Path

import pytest

from pairvpr.config.benchmark_schema import FoldersConfig, ToyCityConfig
from pairvpr.data.benchmarks import load_benchmark, prepare_benchmark
from pairvpr.data.manifest import Benchmark
from pairvpr.errors import UserError

DATABASE = ["001.jpg", "a.jpg", "b, c.jpg", "null.jpg", "sub/d.jpg"]
QUERIES = ["001.jpg", "2020-01-01.jpg", "x.jpg", "y.jpg"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for part, names in (("database", DATABASE), ("queries", QUERIES)):
        for name in names:
            (tmp_path / part / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / part / name).touch()
    return tmp_path


def load(root: Path, *, positives: str | None = None, radius_m: float | None = None) -> Benchmark:
    config = FoldersConfig(
        name="mine",
        database=str(root / "database"),
        queries=str(root / "queries"),
        positives=positives,
        radius_m=radius_m,
    )
    return load_benchmark(config, "unused")


def load_csv(root: Path, content: str | bytes) -> Benchmark:
    (root / "positives.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    return load(root, positives=str(root / "positives.csv"))


def positives_of(benchmark: Benchmark) -> list[list[int]]:
    assert benchmark.positives is not None
    return [ids.tolist() for ids in benchmark.positives]


def test_without_ground_truth(root: Path) -> None:
    benchmark = load(root)
    assert benchmark.positives is None
    assert benchmark.protocol == {"positives": "none", "radius_m": None}
    assert (benchmark.name, benchmark.database.paths, benchmark.queries.paths) == ("mine", DATABASE, QUERIES)


def test_csv_with_duplicates_quotes_and_names_like_numbers(root: Path) -> None:
    benchmark = load_csv(
        root,
        "query,database,note\n"
        "y.jpg,sub/d.jpg,\n"
        'y.jpg,"b, c.jpg",far\n'
        "y.jpg,sub/d.jpg,again\n"
        "001.jpg,001.jpg,1\n"
        '"2020-01-01.jpg",null.jpg,\n',
    )
    assert positives_of(benchmark) == [[0], [3], [], [2, 4]]
    assert benchmark.protocol == {"positives": "list", "radius_m": None}
    assert benchmark.stamp()["num_queries_without_positives"] == 1


@pytest.mark.parametrize(
    "content",
    [
        "database,query\na.jpg,x.jpg\n",
        "\ufeffquery,database\nx.jpg,a.jpg\n",
        "query,database\r\nx.jpg,a.jpg\r\n",
        "query,database\nx.jpg,a.jpg",
    ],
)
def test_csv_as_other_programs_write_it(root: Path, content: str) -> None:
    assert positives_of(load_csv(root, content)) == [[], [], [1], []]


def test_csv_with_a_header_alone_is_refused(root: Path) -> None:
    with pytest.raises(UserError, match=r"positives\.csv: no row that can be used; expected one for each pair$"):
        load_csv(root, "query,database\n")


def test_a_photo_is_no_query_to_itself(root: Path) -> None:
    folder = f"{root}/database"
    config = FoldersConfig(name="folders", database=folder, queries=folder, positives=f"{root}/pairs.csv")
    (root / "pairs.csv").write_text("query,database\na.jpg,a.jpg\n")
    with pytest.raises(UserError, match=r"^folders: .* are queries and database photos at once; expected each photo"):
        load_benchmark(config, "unused")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("nobody.jpg,a.jpg", "row 3: no query photo 'nobody.jpg'"),
        ("x.jpg,nobody.jpg", "row 3: no database photo 'nobody.jpg'"),
        ("1,a.jpg", "row 3: no query photo '1'"),
        ("x.jpg,1", "row 3: no database photo '1'"),
        ("x.jpg,", "row 3: no database photo ''"),
        ("X.JPG,a.jpg", "row 3: no query photo 'X.JPG'"),
    ],
)
def test_csv_with_an_unknown_photo_names_row_and_photo(root: Path, row: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_csv(root, f"query,database\nx.jpg,a.jpg\n{row}\n")
    assert str(caught.value).startswith(f"{root}/positives.csv, {message} in {root}")


def test_csv_rows_are_counted_with_blank_lines(root: Path) -> None:
    with pytest.raises(UserError, match=r"row 5: no query photo 'nobody\.jpg'"):
        load_csv(root, "query,database\n\nx.jpg,a.jpg\n\nnobody.jpg,a.jpg\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("query\nx.jpg\n", "no column database; expected query,database"),
        ("query:database\nx.jpg:a.jpg\n", "no column database, query"),
        ("", "not a CSV file"),
        ("\n", ""),
        ("query,database\nx.jpg\n", "row 2: 1 cells, expected 2"),
        (b"query,database\nna\xefve.jpg,a.jpg\n", "row 2: query is b'na\\xefve.jpg'; expected UTF-8 text"),
        (bytes(range(256)), "not a CSV file"),
        ("query,query,database\nx.jpg,y.jpg,a.jpg\n", "query"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR", "not a CSV file"),
    ],
)
def test_what_is_no_list_of_positives_is_refused(root: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=r"positives\.csv") as caught:
        load_csv(root, content)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["missing.csv", "queries", "queries/x.jpg/nothing.csv"])
def test_a_csv_that_is_not_there(root: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"benchmark\.positives=.*: no such file"):
        load(root, positives=str(root / name))


def test_names_and_a_radius_reach_exactly_the_radius(tmp_path: Path) -> None:
    for part, names in (
        ("database", ["@500003@4000004@.jpg", "@500003@4000004.01@.jpg", "@500000@3999995@.jpg", "far/@0@0@.jpg"]),
        ("queries", ["@500000@4000000@.jpg", "@700000@4000000@.jpg"]),
    ):
        for name in names:
            (tmp_path / part / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / part / name).touch()
    benchmark = load(tmp_path, radius_m=5)
    found = [[benchmark.database.path(image_id) for image_id in ids] for ids in positives_of(benchmark)]
    assert found == [["@500000@3999995@.jpg", "@500003@4000004@.jpg"], []]
    assert benchmark.protocol == {"positives": "radius", "radius_m": 5}
    assert benchmark.queries.utm_m.tolist() == [[500000, 4000000], [700000, 4000000]]


def test_a_radius_needs_names_with_coordinates(root: Path) -> None:
    with pytest.raises(UserError, match=r"benchmark\.database: 001\.jpg has no coordinates in its name"):
        load(root, radius_m=25)


def test_missing_folders_are_named_by_their_keys(root: Path) -> None:
    for key in ("database", "queries"):
        (root / key).rename(root / "moved")
        with pytest.raises(UserError, match=rf"^benchmark\.{key}=.*: no such folder"):
            load(root)
        (root / "moved").rename(root / key)


def test_the_toy_city_is_known_before_it_is_drawn_and_drawn_once(tmp_path: Path) -> None:
    config = ToyCityConfig(name="toy_city", num_places=2, photos_per_place=2)
    benchmark = load_benchmark(config, str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert [len(ids) for ids in positives_of(benchmark)] == [2, 2]
    prepare_benchmark(config, str(tmp_path))
    photos = [
        Path(manifest.url(image_id))
        for manifest in (benchmark.database, benchmark.queries)
        for image_id in range(len(manifest))
    ]
    drawn = {path: path.read_bytes() for path in photos}
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(photos)
    photos[0].unlink()
    photos[1].write_bytes(b"kept")
    prepare_benchmark(config, str(tmp_path))
    assert photos[0].read_bytes() == drawn[photos[0]]
    assert photos[1].read_bytes() == b"kept"
