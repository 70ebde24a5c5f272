"""Nordland: who shows the same place follows from the numbers of frames alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairvpr.config.benchmark_schema import NordlandConfig
from pairvpr.config.compose import load as load_config
from pairvpr.config.schema import CheckBenchmarkConfig
from pairvpr.data.benchmarks import load_benchmark, read_benchmark
from pairvpr.data.benchmarks.check import WHOLE
from pairvpr.data.benchmarks.nordland import frame_number, within_frames
from pairvpr.data.manifest import Benchmark
from pairvpr.data.problems import Problems
from pairvpr.errors import UserError
from pairvpr.toy.benchmarks import write_nordland, write_nordland_with_names


def positives_of(benchmark: Benchmark) -> list[list[int]]:
    assert benchmark.positives is not None
    return [ids.tolist() for ids in benchmark.positives]


def whole(name: str) -> list[list[int]]:
    """Positives of the benchmark in its full size: the rules of its file, and the numbers of its photos."""
    config = load_config(CheckBenchmarkConfig, [f"benchmark={name}", "datasets_root=/data"]).benchmark
    assert isinstance(config, NordlandConfig)
    query_frames = np.arange(WHOLE[name].num_queries) * config.frames_per_query
    found = within_frames(query_frames, np.arange(WHOLE[name].num_database), config.tolerance_frames)
    return [ids.tolist() for ids in found]


def test_numbers_beyond_any_film_are_none() -> None:
    names = ("99999999999999999999.jpg", "9223372036854775807.jpg", "@1e20@0@.jpg", "@0@99999999999999@.jpg")
    assert [frame_number(name) for name in names] == [None] * 4


def test_every_tenth_frame_in_full_size() -> None:
    positives = whole("nordland_2760")
    assert len(positives) == 2_760
    assert (positives[0], positives[1], positives[-1]) == ([0, 1], [9, 10, 11], [27_589, 27_590, 27_591])
    assert [len(ids) for ids in positives] == [2, *[3] * 2_759]


@pytest.mark.slow
def test_every_frame_in_full_size_is_another_test() -> None:
    positives = whole("nordland_27592")
    assert len(positives) == 27_592
    assert positives[0] == list(range(11))
    assert positives[-1] == list(range(27_581, 27_592))
    assert positives[100] == list(range(90, 111))


FRAMES = st.lists(st.integers(0, 60), max_size=30)


@given(FRAMES, st.lists(st.integers(0, 60), unique=True, max_size=30), st.integers(0, 12))
def test_positives_equal_brute_force(query_frames: list[int], database_frames: list[int], tolerance: int) -> None:
    found = within_frames(np.array(query_frames, np.int64), np.array(database_frames, np.int64), tolerance)
    assert [ids.tolist() for ids in found] == [
        [i for i, frame in enumerate(database_frames) if abs(frame - query) <= tolerance] for query in query_frames
    ]


# As a converter names them, with two decimals and with one, cut and not rounded; frame 42 is 100 m along.
@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("0000017.jpg", 17),
        ("sub/0000000.png", 0),
        ("@0@0.0@.jpg", 0),
        ("@0@2.3@.jpg", 1),
        ("@0@4.7@.jpg", 2),
        ("@0000000.00@0000021.42@@@@@00009@@@@@@@@.jpg", 9),
        ("@100.00@0@x.jpg", 42),
        ("@0@65692.8@.jpg", 27_591),
        ("@0@3.5@.jpg", None),
        ("@0@-2.38@.jpg", None),
        ("@0@inf@.jpg", None),
        ("@0@.jpg", None),
        ("photo.jpg", None),
        ("-1.jpg", None),
        ("1_0.jpg", None),
        ("\N{ARABIC-INDIC DIGIT ONE}.jpg", None),
    ],
)
def test_numbers_of_frames(path: str, number: int | None) -> None:
    assert frame_number(path) == number


def test_the_miniature_has_the_first_the_last_and_what_is_off_by_one(tmp_path: Path) -> None:
    write_nordland(str(tmp_path), num_queries=3)
    config = NordlandConfig(
        name="n", database=f"{tmp_path}/ref", queries=f"{tmp_path}/query", frames_per_query=10, tolerance_frames=1
    )
    benchmark = load_benchmark(config, "unused")
    assert positives_of(benchmark) == [[0, 1], [9, 10, 11], [19, 20, 21]]
    assert benchmark.database.paths == [f"{frame:07d}.jpg" for frame in range(22)]
    assert benchmark.protocol == {
        "positives": "frames",
        "radius_m": None,
        "tolerance_frames": 1,
        "frames_per_query": 10,
    }
    config.tolerance_frames = 0
    assert positives_of(load_benchmark(config, "unused")) == [[0], [10], [20]]


def test_names_with_positions_are_numbers_of_frames(tmp_path: Path) -> None:
    write_nordland_with_names(str(tmp_path), num_frames=24)
    test = f"{tmp_path}/images/test"
    config = NordlandConfig(name="n", database=f"{test}/database", queries=f"{test}/queries", tolerance_frames=10)
    positives = positives_of(load_benchmark(config, "unused"))
    assert positives == [list(range(max(0, frame - 10), min(24, frame + 11))) for frame in range(24)]
    assert positives[0] == list(range(11))
    assert positives[12] == list(range(2, 23))


def test_ids_are_those_of_sorted_paths_and_not_of_frames(tmp_path: Path) -> None:
    for part in ("ref", "query"):
        (tmp_path / part).mkdir()
        for frame in range(12):
            (tmp_path / part / f"{frame}.jpg").touch()
    config = NordlandConfig(name="n", database=f"{tmp_path}/ref", queries=f"{tmp_path}/query", tolerance_frames=1)
    benchmark = load_benchmark(config, "unused")
    assert benchmark.database.paths[:4] == ["0.jpg", "1.jpg", "10.jpg", "11.jpg"]
    frames = [int(Path(path).stem) for path in benchmark.database.paths]
    assert [sorted(frames[i] for i in ids) for ids in positives_of(benchmark)] == [
        [frame for frame in (query - 1, query, query + 1) if 0 <= frame < 12] for query in frames
    ]


def test_what_is_wrong_with_frames_is_listed(tmp_path: Path) -> None:
    for part, names in (
        ("ref", ["0000000.jpg", "0000002.jpg", "0000002.png", "0000006.jpg", "cover.jpg"]),
        ("query", ["0000001.jpg"]),
    ):
        (tmp_path / part).mkdir()
        for name in names:
            (tmp_path / part / name).touch()
    config = NordlandConfig(name="n", database=f"{tmp_path}/ref", queries=f"{tmp_path}/query")
    problems = Problems()
    benchmark = read_benchmark(config, "", problems)
    ref, query = f"benchmark.database: {tmp_path}/ref", f"benchmark.queries: {tmp_path}/query"
    assert problems.lines == [
        f"{ref}/0000002.png and 0000002.jpg are both frame 2; expected one",
        f"{ref}/cover.jpg: no frame number in its name; expected 0000000.jpg, 0000001.jpg, ... or @-names one frame "
        "apart",
        f"{ref}: no frame 1 before 0000002.jpg; expected 0, 1, 2, ...",
        f"{ref}: no frames 3 to 5 before 0000006.jpg; expected 0, 1, 2, ...",
        f"{query}: no frame 0 before 0000001.jpg; expected 0, 1, 2, ...",
    ]
    assert (len(benchmark.database), len(benchmark.queries)) == (3, 1)
    with pytest.raises(UserError, match=r"are both frame 2; expected one \(and 4 more; pairvpr check_benchmark"):
        load_benchmark(config, "unused")


def test_both_missing_folders_are_found(tmp_path: Path) -> None:
    config = NordlandConfig(name="n", database=f"{tmp_path}/ref", queries=f"{tmp_path}/query")
    with pytest.raises(UserError, match=r"^benchmark\.database=.*/ref: no such folder.* \(and 1 more"):
        load_benchmark(config, "unused")
