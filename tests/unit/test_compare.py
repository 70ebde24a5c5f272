"""Runs side by side: only those of one test, and whether a difference is more than chance."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pairvpr.data import storage
from pairvpr.data.manifest import Benchmark, Manifest
from pairvpr.evaluation.compare import compare, first_answer_is_right, main, read_run
from pairvpr.evaluation.predictions import predictions_table, write_predictions
from pairvpr.evaluation.report import RunFacts, metrics
from pairvpr.retrieval.pipeline import Answer
from tests.support.small import small_model_config

NUM_QUERIES = 40
FACTS = RunFacts(
    index={"kind": "flat"},
    weights_sha256="ab" * 32,
    untrained=False,
    num_candidates=3,
    seconds_describe=0.0,
    seconds_retrieve=0.0,
    seconds_rerank=0.0,
    num_rejected_database=0,
    num_rejected_queries=0,
)


def benchmark(name: str = "made_up", *, radius_m: float | None = 25.0) -> Benchmark:
    """Query q shows the same place as photo q."""
    return Benchmark(
        name=name,
        database=Manifest.of("/d", [f"{number:03d}.jpg" for number in range(60)]),
        queries=Manifest.of("/q", [f"{number:03d}.jpg" for number in range(NUM_QUERIES)]),
        positives=None if radius_m is None else [np.array([query_id]) for query_id in range(NUM_QUERIES)],
        protocol={"positives": "radius", "radius_m": radius_m},
    )


def write_run(folder: Path, right: Sequence[int], test: Benchmark | None = None, **facts: Any) -> str:
    """A finished run whose best re-ranked answers are right for the queries `right`; retrieval is right for none."""
    test = test or benchmark()
    answers = []
    for query_id in range(len(test.queries)):
        candidates = np.array([50, 51, query_id, 52])
        reranked = candidates[[2, 0, 1]] if query_id in right else candidates[[0, 2, 1]]
        answers.append(Answer(query_id, candidates, np.zeros(4, np.float32), reranked, np.zeros(3, np.float32)))
    write_predictions(str(folder / "predictions.parquet"), predictions_table(test, answers))
    content = metrics(test, answers, small_model_config(), replace(FACTS, **facts))
    storage.write_json(str(folder / "metrics.json"), content)
    storage.write_json(str(folder / "settings.json"), {})
    return str(folder)


def refusal(*runs: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says to what it refuses: one line, exit code 2, nothing printed."""
    assert main(runs) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_a_table_of_three_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        write_run(tmp_path / "one", range(10)),
        write_run(tmp_path / "two", range(20), weights_sha256="cd" * 32, untrained=True),
        write_run(tmp_path / "three", [], num_candidates=2),
    ]
    assert main(runs) == 0
    heading, *table = capsys.readouterr().out.splitlines()
    assert heading == "made_up: 40 queries, 60 database photos; recall@N in percent"
    # One of four candidates at most is right, so N = 5 and 10 are not there.
    assert [line.split() for line in table] == [
        ["run", "model", "weights", "K"]
        + [f"{step}@{n}" for step in ("global", "re-ranked") for n in (1, 5, 10)]
        + ["ceiling"],
        [runs[0], "small", "abababababab", "3", "0.0", "-", "-", "25.0", "-", "-", "100.0"],
        [runs[1], "small", "(untrained)", "cdcdcdcdcdcd", "3", "0.0", "-", "-", "50.0", "-", "-", "100.0"],
        [runs[2], "small", "abababababab", "2", "0.0", "-", "-", "0.0", "-", "-", "0.0"],
    ]
    assert len({len(line) for line in table}) == 1


@pytest.mark.parametrize(
    ("before", "after", "counts", "difference", "verdict"),
    [
        # The sign test by hand: 2 x 0.5^4 = 0.125, 2 x 0.5^6 = 0.031.
        (range(10), range(14), "4 queries corrected, 0 broken", "+10.0 points", "is not beyond chance"),
        (range(10), range(16), "6 queries corrected, 0 broken", "+15.0 points", "is beyond chance"),
        (range(10), range(25), "15 queries corrected, 0 broken", "+37.5 points", "is beyond chance"),
        (range(25), range(10), "0 queries corrected, 15 broken", "-37.5 points", "is beyond chance"),
        (range(10), range(1, 12), "2 queries corrected, 1 broken", "+2.5 points", "is not beyond chance"),
        (range(10), range(10), "0 queries corrected, 0 broken", "+0.0 points", "is not beyond chance"),
    ],
)
def test_two_runs_query_by_query(
    tmp_path: Path, before: range, after: range, counts: str, difference: str, verdict: str
) -> None:
    one, two = write_run(tmp_path / "one", before), write_run(tmp_path / "two", after)
    text = compare([one, two])
    assert f"from {one} to {two}, re-ranked, N = 1: {counts}\n" in text
    assert f"the difference in recall@1, {difference}, {verdict}: 95 % interval " in text
    assert "(paired bootstrap over 40 queries), exact sign test p = " in text
    assert compare([one, two]) == text
    assert first_answer_is_right(read_run(two)).tolist() == [query_id in after for query_id in range(NUM_QUERIES)]


def test_each_benchmark_has_a_table_of_its_own(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / weights / name, range(10), benchmark(name, radius_m=radius_m))
        for weights in ("old", "new")
        for name, radius_m in (("night", 25.0), ("day", 10.0))
    ]
    first, second = compare([*runs, write_run(tmp_path / "third", range(5), benchmark("day", radius_m=10.0))]).split(
        "\n\nday: "
    )
    assert first.startswith("night: 40 queries")
    assert [run in first for run in runs] == [True, False, True, False]
    assert "queries corrected" in first
    assert [run in second for run in runs] == [False, True, False, True]
    assert "queries corrected" not in second  # there are three of them


def test_a_url_is_a_run(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one", range(10)), write_run(tmp_path / "two", range(20))
    assert "10 queries corrected" in compare([f"file://{one}", f"{two}/"])


def other(**changes: Any) -> Benchmark:
    return replace(benchmark(), **changes)


@pytest.mark.parametrize(
    ("test", "named"),
    [
        (other(protocol={"positives": "radius", "radius_m": 10.0}), ["radius_m: 25.0 here, 10.0 there"]),
        (
            other(protocol={"positives": "frames", "tolerance_frames": 1}),
            ["positives: radius here, frames there", "radius_m: 25.0 here, absent", "tolerance_frames: absent here, 1"],
        ),
        (
            other(positives=[np.array([0])] * NUM_QUERIES),
            ["positives_sha256: "],
        ),
        (
            other(positives=[np.array([query_id] * (query_id > 2)) for query_id in range(NUM_QUERIES)]),
            [
                "num_queries_with_positives: 40 here, 37 there",
                "num_queries_without_positives: 0 here, 3 there",
                "positives_sha256: ",
            ],
        ),
        (
            other(database=Manifest.of("/d", [f"{number:03d}.png" for number in range(60)])),
            ["database_paths_sha256: "],
        ),
        (
            other(queries=Manifest.of("/q", [f"{number:03d}.png" for number in range(NUM_QUERIES)])),
            ["queries_paths_sha256: "],
        ),
        (
            other(database=Manifest.of("/d", [f"{number:03d}.jpg" for number in range(61)])),
            ["num_database: 60 here, 61 there", "database_paths_sha256: "],
        ),
        (
            other(protocol={"positives": "radius", "radius_m": 25.0, "queries_without_positives": "dropped"}),
            ["queries_without_positives: count as a miss here, dropped there"],
        ),
    ],
)
def test_different_tests_are_refused_by_name_of_what_differs(
    tmp_path: Path, test: Benchmark, named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = write_run(tmp_path / "one", range(10)), write_run(tmp_path / "two", range(10), test)
    message = refusal(one, two, capsys=capsys)
    assert message.startswith(f"error: made_up: {one} (here) and {two} (there) are different tests")
    found = message.split("can't be compared: ")[1].split("; ")
    assert len(found) == len(named)
    assert all(part.startswith(name) for part, name in zip(found, named, strict=True)), found
    refusal(one, write_run(tmp_path / "three", []), two, capsys=capsys)


def test_the_protocol_counts_and_not_the_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, mine = write_run(tmp_path / "one", range(10)), write_run(tmp_path / "mine", range(20), benchmark("mine"))
    assert "10 queries corrected" in compare([one, mine])
    far = write_run(tmp_path / "far", range(10), benchmark("far", radius_m=50.0))
    message = refusal(one, far, capsys=capsys)
    assert message.startswith(f"error: made_up and far: {one} (here) and {far} (there) are different tests")
    assert message.endswith("can't be compared: radius_m: 25.0 here, 50.0 there\n")


def test_where_the_photos_lie_makes_no_other_test(tmp_path: Path) -> None:
    moved = other(database=Manifest.of("s3://bucket/d", benchmark().database.paths))
    assert "corrected" in compare([write_run(tmp_path / "one", []), write_run(tmp_path / "two", [], moved)])


def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_run(tmp_path / "good", [])
    assert "0 run given: expected two or more" in refusal(capsys=capsys)
    assert "1 run given: expected two or more" in refusal(good, capsys=capsys)

    bad = tmp_path / "bad"
    assert f"{bad}: no metrics.json there; expected the output directory" in refusal(good, str(bad), capsys=capsys)
    bad.write_text("a file")
    assert f"{bad}: no metrics.json there" in refusal(str(bad), good, capsys=capsys)
    bad.unlink()
    storage.write_json(str(bad / "settings.json"), {})
    assert f"{bad}: the run is not finished" in refusal(good, str(bad), capsys=capsys)
    (bad / "metrics.json").write_text('{"benchmark": ')
    assert f"{bad}/metrics.json is damaged: not JSON" in refusal(good, str(bad), capsys=capsys)
    (bad / "metrics.json").write_text('{"benchmark": "x", "recall": {}}')
    assert "no entry protocol, model, candidate_ceiling" in refusal(good, str(bad), capsys=capsys)
    content = storage.read_json(f"{good}/metrics.json")
    content.pop("seal", None)
    for damage in ({"recall": {}}, {"model": None}, {"protocol": 3}, {"candidate_ceiling": "x"}):
        storage.write_json(str(bad / "metrics.json"), content | damage)
        assert f"{bad}/metrics.json: damaged; expected" in refusal(good, str(bad), capsys=capsys)
    assert "gs://" in (said := refusal(good, "gs://bucket/run", capsys=capsys))
    assert "not a JSON file" not in said
    (bad / "metrics.json").write_text("[1]")
    assert "metrics.json is damaged: not a JSON object" in refusal(good, str(bad), capsys=capsys)

    without = write_run(tmp_path / "without", [], benchmark(radius_m=None))
    assert f"{without}: made_up has no ground truth, so there is no recall" in refusal(good, without, capsys=capsys)


def test_predictions_that_do_not_belong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = write_run(tmp_path / "good", []), Path(write_run(tmp_path / "bad", []))
    file = bad / "predictions.parquet"
    file.write_bytes(b"PAR1 cut short")
    assert f"{file} is damaged: not the expected Parquet" in refusal(good, str(bad), capsys=capsys)
    file.unlink()
    assert f"{file}: no such file; expected the predictions of a run" in refusal(good, str(bad), capsys=capsys)
    fewer = other(
        queries=Manifest.of("/q", benchmark().queries.paths[:7]),
        positives=[np.array([query_id]) for query_id in range(7)],
    )
    file.write_bytes(Path(write_run(tmp_path / "fewer", [], fewer), "predictions.parquet").read_bytes())
    assert f"{file}: 7 queries with ground truth, 40 in metrics.json" in refusal(good, str(bad), capsys=capsys)


def test_needs_neither_torch_nor_ray(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "one", range(10)), write_run(tmp_path / "two", range(20))]
    code = (
        "import sys; sys.modules |= dict.fromkeys(('torch', 'ray', 'faiss', 'hydra')); "
        "from pairvpr.evaluation.compare import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *runs], capture_output=True, text=True, check=True, timeout=60)
    assert "10 queries corrected, 0 broken" in done.stdout
    line = [sys.executable, "-c", "import sys; from pairvpr.cli import main; sys.exit(main())", "compare", *runs]
    assert subprocess.run(line, capture_output=True, text=True, check=True, timeout=60).stdout == done.stdout
