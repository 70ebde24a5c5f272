"""MSLS from its CSV files: which rows take part, who shows the same place, and what is wrong with a download."""

from __future__ import annotations

import csv
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pairvpr.config.benchmark_schema import MslsConfig, MslsSplit, MslsSubtask
from pairvpr.data.benchmarks import load_benchmark, read_benchmark
from pairvpr.data.manifest import Benchmark
from pairvpr.data.problems import Problems
from pairvpr.errors import UserError
from pairvpr.toy import city as toy_city
from pairvpr.toy.benchmarks import MSLS_CITIES, write_msls

SUBTASKS = ["all", "s2w", "w2s", "o2n", "n2o", "d2n", "n2d"]
Rows = dict[str, tuple[float, float, bool, str]]  # key -> easting, northing, panorama, subtasks by spaces


def load(root: Path, **settings: object) -> Benchmark:
    return load_benchmark(config(root, **settings), "unused")


def config(root: Path, **settings: object) -> MslsConfig:
    return MslsConfig(name="msls", root=str(root), **({"cities": ["cph", "sf"]} | settings))  # type: ignore[arg-type]


def positives_of(benchmark: Benchmark) -> list[list[int]]:
    assert benchmark.positives is not None
    return [ids.tolist() for ids in benchmark.positives]


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 places a city: 8 database photos and a panorama; 5 queries, one more in no subtask, and a panorama."""
    root = tmp_path_factory.mktemp("msls")
    write_msls(str(root), num_places=4)
    return root


def places(paths: list[str], root: Path, split: str) -> list[tuple[str, int]]:
    """City and place of each photo, by its position in postprocessed.csv: a place is every 40 m along the street."""
    found = []
    for path in paths:
        city, part, _, name = path.split("/")
        lines = (root / split / city / part / "postprocessed.csv").read_text().splitlines()
        easting = next(float(line.split(",")[2]) for line in lines if line.split(",")[1] == name.removesuffix(".jpg"))
        found.append((city, round((easting - 447_040) / 40)))
    return found


def test_two_cities_are_one_index_and_match_within_themselves(miniature: Path) -> None:
    benchmark = load(miniature)
    per_city = [0, 0, 1, 1, 2, 2, 3, 3]
    assert places(benchmark.database.paths, miniature, "train_val") == [
        *(("cph", place) for place in per_city),
        *(("sf", place) for place in per_city),
    ]
    assert places(benchmark.queries.paths, miniature, "train_val") == [
        *(("cph", place) for place in range(4)),
        *(("sf", place) for place in range(4)),
    ]
    assert positives_of(benchmark) == [[2 * query, 2 * query + 1] for query in range(8)]
    assert benchmark.query_groups == ["cph"] * 4 + ["sf"] * 4
    assert not benchmark.has_submission
    # The cities stand on the same ground: without the rule of the city each query would match in both.
    assert abs(benchmark.queries.utm_m[:4] - benchmark.queries.utm_m[4:]).max() < 25


def test_the_stamp_says_which_test_it_is(miniature: Path) -> None:
    stamp = load(miniature).stamp()
    assert {name: value for name, value in stamp.items() if "sha256" not in name} == {
        "num_queries": 8,
        "num_queries_with_positives": 8,
        "num_queries_without_positives": 0,
        "num_database": 16,
        "exif_rotation": "applied",
        "positives": "radius, within the city",
        "radius_m": 25.0,
        "subtask": "all",
        "cities": ["cph", "sf"],
        "queries_without_positives": "dropped",
        "num_queries_dropped": 2,
    }


def test_queries_go_by_light_and_sequence(miniature: Path, by_hand: Path) -> None:
    """As the tables say, row by row; what a table does not hold is no group."""
    benchmark = load(miniature)
    light, sequence = {}, {}
    for city in ("cph", "sf"):
        folder = miniature / "train_val" / city / "query"
        for name, column, found in (("postprocessed", "night", light), ("seq_info", "sequence_key", sequence)):
            with (folder / f"{name}.csv").open(newline="") as file:
                found |= {row["key"]: row[column] for row in csv.DictReader(file)}
    keys = [Path(path).stem for path in benchmark.queries.paths]
    expected = {"True": "night", "False": "day"}
    assert (
        list(benchmark.query_kinds["light"])
        == [expected[light[key]] for key in keys]
        == ["night"] * 2 + ["day"] * 2 + ["night"] * 2 + ["day"] * 2
    )
    assert list(benchmark.query_kinds["sequence"]) == [sequence[key] for key in keys]
    file = by_hand / "train_val" / "sf" / "query" / "postprocessed.csv"
    file.write_text(file.read_text().replace(",night,", ",dark,"))
    assert dict(load(by_hand, cities=["sf"]).query_kinds) == {"sequence": ["s", "s"]}


def test_queries_go_by_subtask(miniature: Path, tmp_path: Path) -> None:
    """As the table says, row by row: d2n holds two places of each city, the others all."""
    benchmark = load(miniature)
    belongs: dict[str, dict[str, str]] = {}
    for city in ("cph", "sf"):
        with (
            (miniature / "train_val" / city / "query" / "seq_info.csv").open(newline="") as names,
            (miniature / "train_val" / city / "query" / "subtask_index.csv").open(newline="") as flags,
        ):
            rows = zip(csv.DictReader(names), csv.DictReader(flags), strict=True)
            belongs |= {name["key"]: flag for name, flag in rows}
    keys = [Path(path).stem for path in benchmark.queries.paths]
    found = benchmark.groupings["subtask"]
    assert list(found) == SUBTASKS[1:]
    assert {name: ids.tolist() for name, ids in found.items()} == {
        name: [i for i, key in enumerate(keys) if belongs[key][name] == "True"] for name in SUBTASKS[1:]
    }
    assert found["d2n"].tolist() == [0, 1, 4, 5]
    assert "subtask" not in load(miniature, subtask=MslsSubtask.d2n).groupings
    root = shutil.copytree(miniature, tmp_path / "copy")
    table = root / "train_val" / "sf" / "query" / "subtask_index.csv"
    whole = table.read_text()
    table.write_text(whole.replace("s2w", "spare"))
    assert list(load(root).groupings["subtask"]) == ["w2s", "o2n", "n2o", "d2n", "n2d"], "not all cities have it"
    rows = [line.split(",") for line in whole.splitlines()]
    column = rows[0].index("d2n")
    rows[1:] = [[*row[:column], "False", *row[column + 1 :]] for row in rows[1:]]
    table.write_text("\n".join(map(",".join, rows)) + "\n")
    assert load(root).groupings["subtask"]["d2n"].tolist() == [0, 1], "of the other city alone"
    rows[2][column] = "yes"
    table.write_text("\n".join(map(",".join, rows)) + "\n")
    with pytest.raises(UserError, match=r"subtask_index\.csv.*d2n is 'yes'; expected True or False"):
        load(root)


def test_a_night_subtask(miniature: Path) -> None:
    benchmark = load(miniature, subtask=MslsSubtask.d2n)
    database, queries = (places(part.paths, miniature, "train_val") for part in (benchmark.database, benchmark.queries))
    assert database == [(city, place) for city in ("cph", "sf") for place in range(4)]
    assert queries == [(city, place) for city in ("cph", "sf") for place in range(2)]
    assert positives_of(benchmark) == [[0], [1], [4], [5]]
    stamp = benchmark.stamp()
    assert (stamp["subtask"], stamp["num_queries_dropped"]) == ("d2n", 0)


def test_panoramas_are_in_the_download_and_not_in_the_test(miniature: Path) -> None:
    benchmark = load(miniature)
    for part, photos in (("database", benchmark.database), ("query", benchmark.queries)):
        for city in ("cph", "sf"):
            lines = (miniature / "train_val" / city / part / "raw.csv").read_text().splitlines()
            (key,) = [line.split(",")[1] for line in lines if line.endswith(",True")]
            assert (miniature / "train_val" / city / part / "images" / f"{key}.jpg").is_file()
            assert not [path for path in photos.paths if key in path]


def test_the_order_of_cities_is_that_of_the_setting(miniature: Path) -> None:
    benchmark = load(miniature, cities=["sf", "cph"])
    assert benchmark.query_groups == ["sf"] * 4 + ["cph"] * 4
    assert positives_of(load(miniature, cities=["sf"])) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_the_challenge_has_no_ground_truth_and_names_photos_by_their_keys(miniature: Path) -> None:
    cities = list(MSLS_CITIES["test"])
    benchmark = load(miniature, split=MslsSplit.test, cities=cities)
    assert benchmark.positives is None
    assert benchmark.has_submission
    assert (len(benchmark.queries), len(benchmark.database)) == (6 * 5, 6 * 8)
    assert benchmark.query_groups == [city for city in cities for _ in range(5)]
    lines = (miniature / "test" / "miami" / "query" / "seq_info.csv").read_text().splitlines()[2:]  # 1st: no subtask
    assert [Path(path).stem for path in benchmark.queries.paths[:5]] == [line.split(",")[1] for line in lines]
    stamp = benchmark.stamp()
    assert (stamp["positives"], stamp["queries_without_positives"], stamp["radius_m"]) == ("none", None, None)
    assert "num_queries_dropped" not in stamp


def test_the_miniature_is_drawn_from_streets_of_benchmarks_and_the_same_each_time(
    miniature: Path, tmp_path: Path
) -> None:
    write_msls(str(tmp_path), num_places=4)
    for file in sorted(path for path in miniature.rglob("*") if path.is_file()):
        assert (tmp_path / file.relative_to(miniature)).read_bytes() == file.read_bytes()
    with pytest.raises(UserError, match="seed 1000: expected 0 to 999, because training sets"):
        write_msls(str(tmp_path), seed=999)
    assert toy_city.QUERY_DAYS[0] not in toy_city.DATABASE_DAYS


# A download written by hand: `keys` by the order of their rows.


def write_part(folder: Path, rows: Rows) -> None:
    (folder / "images").mkdir(parents=True)
    lines: dict[str, list[str]] = {
        "seq_info": [",key,sequence_key,frame_number"],
        "subtask_index": [f",{','.join(SUBTASKS)}"],
        "raw": [",key,lon,lat,ca,captured_at,pano"],
        "postprocessed": [",key,easting,northing,unique_cluster,control_panel,night,view_direction"],
    }
    for i, (key, (east, north, pano, subtasks)) in enumerate(rows.items()):
        (folder / "images" / f"{key}.jpg").touch()
        lines["seq_info"].append(f"{i},{key},s,{i}")
        lines["subtask_index"].append(",".join([str(i), *(str(name in subtasks.split()) for name in SUBTASKS)]))
        lines["raw"].append(f"{i},{key},1.5,2.5,90.0,2019-01-01,{pano}")
        lines["postprocessed"].append(f"{i},{key},{east},{north},0,False,False,Forward")
    for name, content in lines.items():
        (folder / f"{name}.csv").write_text("\n".join([*content, ""]))


DATABASE: Rows = {
    "near": (500_025.0, 4_000_000.0, False, "all"),
    "far": (500_025.01, 4_000_000.0, False, "all"),
    "diagonal": (500_015.0, 4_000_020.0, False, "all n2o"),
    "round": (500_000.0, 4_000_000.0, True, "all n2o"),
    "other_task": (500_000.0, 4_000_000.0, False, "n2o"),
}
QUERIES: Rows = {
    "zzz": (500_000.0, 4_000_000.0, False, "all n2o"),
    "lonely": (500_000.0, 4_000_100.0, False, "all"),
    "aaa": (500_030.0, 4_000_000.0, False, "all"),
    "full_circle": (500_000.0, 4_000_000.0, True, "all"),
}


@pytest.fixture
def by_hand(tmp_path: Path) -> Path:
    write_part(tmp_path / "train_val" / "sf" / "database", DATABASE)
    write_part(tmp_path / "train_val" / "sf" / "query", QUERIES)
    return tmp_path


def test_rows_keep_their_order_and_the_radius_is_exact(by_hand: Path) -> None:
    benchmark = load(by_hand, cities=["sf"])
    assert benchmark.database.paths == [f"sf/database/images/{key}.jpg" for key in ("near", "far", "diagonal")]
    assert benchmark.queries.paths == ["sf/query/images/zzz.jpg", "sf/query/images/aaa.jpg"]
    assert positives_of(benchmark) == [[0, 2], [0, 1, 2]]  # zzz is 25, 25.01 and 25 m away, aaa 5, 4.99 and 25 m
    assert benchmark.stamp()["num_queries_dropped"] == 1
    assert benchmark.database.utm_m.tolist()[1] == [500_025.01, 4_000_000.0]


def test_a_subtask_chooses_queries_and_database(by_hand: Path) -> None:
    benchmark = load(by_hand, cities=["sf"], subtask=MslsSubtask.n2o)
    assert [Path(path).stem for path in benchmark.database.paths] == ["diagonal", "other_task"]
    assert [Path(path).stem for path in benchmark.queries.paths] == ["zzz"]
    assert positives_of(benchmark) == [[0, 1]]


def test_photos_that_no_table_names_take_no_part(by_hand: Path) -> None:
    before = load(by_hand, cities=["sf"]).stamp()
    (by_hand / "train_val" / "sf" / "database" / "images" / "extra.jpg").touch()
    assert load(by_hand, cities=["sf"]).stamp() == before


def test_other_columns_and_their_order_do_not_matter(by_hand: Path) -> None:
    before = load(by_hand, cities=["sf"]).stamp()
    file = by_hand / "train_val" / "sf" / "database" / "subtask_index.csv"
    rows = [line.split(",") for line in file.read_text().splitlines()]
    file.write_text("\r\n".join(",".join([*row[1:][::-1], "x"]) for row in rows))
    assert load(by_hand, cities=["sf"]).stamp() == before


@pytest.mark.parametrize(
    ("subtask", "query", "message"),
    [
        ("d2n", "", "no database photo of benchmark.subtask=d2n in sf"),
        ("n2o", "zzz", "no query photo of benchmark.subtask=n2o in sf"),
    ],
)
def test_a_subtask_without_photos_is_refused(by_hand: Path, subtask: str, query: str, message: str) -> None:
    file = by_hand / "train_val" / "sf" / "query" / "subtask_index.csv"
    if query:
        file.write_text(file.read_text().replace("True", "False"))
    with pytest.raises(UserError, match=message):
        load(by_hand, cities=["sf"], subtask=MslsSubtask(subtask))


def test_queries_of_which_none_has_a_positive_are_refused(by_hand: Path) -> None:
    replaced("postprocessed.csv", "zzz,500000.0", "zzz,500300.0")(by_hand / "train_val" / "sf" / "query")
    with pytest.raises(UserError, match=r"no query photo with a positive of benchmark\.subtask=n2o in sf"):
        load(by_hand, cities=["sf"], subtask=MslsSubtask.n2o)


def replaced(name: str, old: str, new: str) -> Callable[[Path], None]:
    """A fault: `old` becomes `new` in a table of the database."""

    def damage(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return damage


FAULTS: list[tuple[Callable[[Path], object], list[str]]] = [
    (
        replaced("postprocessed.csv", "500025.01", "nan"),
        ["postprocessed.csv, row 3: easting is 'nan'; expected a number"],
    ),
    (
        replaced("postprocessed.csv", "4000020.0", ""),
        ["postprocessed.csv, row 4: northing is empty; expected a number"],
    ),
    (
        replaced("postprocessed.csv", "easting", "east"),
        ["postprocessed.csv: no column easting; expected key,easting,northing"],
    ),
    (
        replaced("subtask_index.csv", ",all,", ",every,"),
        ["subtask_index.csv: no column all; expected all"],
    ),
    (
        replaced("subtask_index.csv", "True", ""),
        ["subtask_index.csv, row 2: all is empty; expected True or False"],
    ),
    (replaced("raw.csv", "True", "maybe"), ["raw.csv, row 5: pano is 'maybe'; expected True or False"]),
    (
        replaced("raw.csv", "diagonal", "vertical"),
        ["raw.csv, row 4: key is 'vertical'; expected the same as in {folder}/seq_info.csv, row 4, in this row and 0"],
    ),
    (
        lambda folder: (folder / "raw.csv").write_text((folder / "raw.csv").read_text()[:-60]),
        [
            "raw.csv, row 5: 5 cells, expected 7",
            "raw.csv: its last whole row is 4; expected 6, as in {folder}/seq_info.csv",
        ],
    ),
    (lambda folder: (folder / "images" / "far.jpg").unlink(), ["seq_info.csv, row 3: no photo 'images/far.jpg' in "]),
    (lambda folder: (folder / "seq_info.csv").unlink(), ["seq_info.csv: no such file"]),
    (
        lambda folder: [photo.unlink() for photo in (folder / "images").iterdir()],
        ["images: no photo there; expected the 3 that the CSV files name"],
    ),
]


@pytest.mark.parametrize(("damage", "expected"), FAULTS)
def test_a_fault_is_one_line_that_names_file_and_row(
    by_hand: Path, damage: Callable[[Path], object], expected: list[str]
) -> None:
    folder = by_hand / "train_val" / "sf" / "database"
    damage(folder)
    problems = Problems()
    with problems.gathered():
        read_benchmark(config(by_hand, cities=["sf"]), "", problems)
    for line, part in zip(problems.lines, expected, strict=True):
        assert f"{folder}/{part.format(folder=folder)}" in line
    with pytest.raises(UserError) as caught:
        load(by_hand, cities=["sf"])
    assert str(caught.value).startswith(problems.lines[0])
    assert "\n" not in str(caught.value)


def test_two_rows_of_one_photo(by_hand: Path) -> None:
    folder = by_hand / "train_val" / "sf" / "database"
    for name in ("seq_info.csv", "raw.csv", "postprocessed.csv"):
        replaced(name, "far", "near")(folder)
    with pytest.raises(UserError) as caught:
        load(by_hand, cities=["sf"])
    file = f"{folder}/seq_info.csv"
    assert str(caught.value) == (f"{file}, row 3: images/near.jpg again, as in {file}, row 2; expected each photo once")


def test_rows_that_take_no_part_may_hold_anything(by_hand: Path) -> None:
    folder = by_hand / "train_val" / "sf" / "database"
    before = load(by_hand, cities=["sf"]).stamp()
    replaced("postprocessed.csv", "other_task,500000.0", "other_task,nan")(folder)
    (folder / "images" / "round.jpg").unlink()
    assert load(by_hand, cities=["sf"]).stamp() == before


def test_folders_that_are_not_there(by_hand: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^benchmark\.root=.*nowhere: it has no folder train_val/; expected"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"train_val/cph/database: no such folder; expected images/ .* \(and 1 more"):
        load(by_hand)


def test_photos_are_found_by_the_rule_of_tables(by_hand: Path) -> None:
    """As they come from a disk that writes endings in capitals."""
    before = load(by_hand, cities=["sf"])
    for photo in (by_hand / "train_val" / "sf" / "database" / "images").iterdir():
        photo.rename(photo.with_suffix(".JPG"))
    after = load(by_hand, cities=["sf"])
    assert after.database.paths == [path.replace(".jpg", ".JPG") for path in before.database.paths]
    np.testing.assert_array_equal(after.database.utm_m, before.database.utm_m)


# The test cities with the ground truth that their owners published, in their tables or in a file of its own.


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    write_msls(str(root), num_places=4, test_has_positions=True)
    return root


def the_test(root: Path, **settings: object) -> Benchmark:
    return load(root, **({"split": MslsSplit.test, "cities": list(MSLS_CITIES["test"])} | settings))


def positions_by_key(root: Path, city: str, part: str) -> dict[str, tuple[float, float]]:
    with (root / "test" / city / part / "postprocessed.csv").open(newline="") as file:
        return {row["key"]: (float(row["easting"]), float(row["northing"])) for row in csv.DictReader(file)}


def matches_by_hand(benchmark: Benchmark, root: Path) -> list[list[int]]:
    """By distance, one pair at a time, from the tables and the cities in the photos' paths."""
    parts = (("database", benchmark.database), ("query", benchmark.queries))
    tables = {(city, part): positions_by_key(root, city, part) for city in MSLS_CITIES["test"] for part, _ in parts}

    def place(path: str) -> tuple[str, float, float]:
        city, part, _, name = path.split("/")
        return (city, *tables[city, part][name.removesuffix(".jpg")])

    database, queries = ([place(path) for path in photos.paths] for _, photos in parts)
    return [
        [i for i, (at, e, n) in enumerate(database) if at == city and math.hypot(e - east, n - north) <= 25]
        for city, east, north in queries
    ]


def test_published_positions_are_the_truth_of_the_challenge(published: Path, miniature: Path) -> None:
    benchmark, before = the_test(published), the_test(miniature)
    expected = matches_by_hand(benchmark, published)
    assert positives_of(benchmark) == expected
    assert sum(map(len, expected)) == 6 * 4 * 2
    assert [ids for ids in expected if not ids] == [[]] * 6  # each city has a query where no database photo is
    # The challenge's photos stay what they were, so its submission keeps a line for each query.
    assert (benchmark.queries.paths, benchmark.database.paths) == (before.queries.paths, before.database.paths)
    assert benchmark.has_submission
    stamp = benchmark.stamp()
    assert (stamp["positives"], stamp["radius_m"]) == ("radius, within the city", 25.0)
    assert (stamp["num_queries"], stamp["num_queries_with_positives"]) == (30, 24)
    assert stamp["queries_without_positives"] == "count as a miss"


@pytest.mark.parametrize("part", ["query", "database"])
def test_half_of_a_published_truth_is_said(published: Path, tmp_path: Path, part: str) -> None:
    root = tmp_path / "msls"
    shutil.copytree(published, root)
    file = root / "test" / "bengaluru" / part / "postprocessed.csv"
    file.write_text(file.read_text().replace("northing", "north"))
    with pytest.raises(UserError, match=rf"bengaluru/{part}/postprocessed.csv: no table with easting, northing, but "):
        the_test(root)
    assert positives_of(the_test(root, cities=["miami", "athens"])) == positives_of(
        the_test(published, cities=["miami", "athens"])
    )
    for city in MSLS_CITIES["test"]:
        (root / "test" / city / part / "postprocessed.csv").unlink()
    assert the_test(root).positives is None


@pytest.mark.parametrize("names", ["keys", "paths"])
def test_a_truth_in_files_of_its_own(published: Path, miniature: Path, tmp_path: Path, names: str) -> None:
    """Pairs in one file, and positions in two, for the download without positions."""
    known = the_test(published)

    def name(path: str) -> str:
        return Path(path).stem if names == "keys" else path

    pairs = tmp_path / "pairs.csv"
    lines = [
        f"{name(known.queries.path(query))},{name(known.database.path(image_id))}"
        for query, ids in enumerate(positives_of(known))
        for image_id in ids
    ]
    random.Random(0).shuffle(lines)
    pairs.write_text("\n".join(["query,database", *lines]))
    listed = the_test(miniature, positives=str(pairs))
    assert positives_of(listed) == positives_of(known)
    assert (listed.stamp()["positives"], listed.stamp()["radius_m"]) == ("list", None)

    tables = {}
    for part, photos in (("database", known.database), ("queries", known.queries)):
        tables[part] = tmp_path / f"{part}.csv"
        rows = [f"{name(path)},{e},{n}" for path, (e, n) in zip(photos.paths, photos.utm_m.tolist(), strict=True)]
        random.Random(1).shuffle(rows)
        tables[part].write_text("\n".join(["path,utm_east,utm_north", *rows]))
    settings = {"database_table": str(tables["database"]), "queries_table": str(tables["queries"])}
    placed = the_test(miniature, **settings)
    assert positives_of(placed) == positives_of(known)
    assert np.array_equal(placed.database.utm_m, known.database.utm_m)
    lines = tables["queries"].read_text().splitlines()
    tables["queries"].write_text("\n".join(lines[:-1]))
    with pytest.raises(UserError, match=r"queries.csv: no position of .* and 0 others; expected a row for each photo"):
        the_test(miniature, **settings)
    with pytest.raises(UserError, match="database_table is set alone"):
        the_test(miniature, database_table=str(tables["database"]))


def test_a_listed_truth_takes_the_place_of_positions(by_hand: Path, tmp_path: Path) -> None:
    """The validation cities drop a query without a match, whoever says so."""
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("query,database\nlonely,far\nzzz,sf/database/images/near.jpg\n")
    benchmark = load(by_hand, cities=["sf"], positives=str(pairs))
    assert [Path(path).stem for path in benchmark.queries.paths] == ["zzz", "lonely"]
    assert positives_of(benchmark) == [[0], [1]]
    stamp = benchmark.stamp()
    assert (stamp["positives"], stamp["num_queries_dropped"]) == ("list", 1)
    pairs.write_text("query,database\nlonely,far\nzzz,nearer\n")
    with pytest.raises(UserError, match=r"pairs.csv, row 3: no database photo 'nearer' in "):
        load(by_hand, cities=["sf"], positives=str(pairs))
