"""`check_benchmark`: counts, a sample of photos, and every problem of a download in one pass."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image

from pairvpr.cli import run_job
from pairvpr.config.compose import load
from pairvpr.config.schema import CheckBenchmarkConfig
from pairvpr.data.benchmarks import load_benchmark
from pairvpr.data.benchmarks.check import WHOLE, check_benchmark
from pairvpr.errors import UserError
from pairvpr.toy.benchmarks import write_benchmarks, write_msls, write_named
from tests.support.small import PUBLIC

pytestmark = pytest.mark.slow


def check(root: Path, name: str, *more: str) -> list[str]:
    """Problems of a miniature: under another name than the whole one, so that its counts are no problem."""
    return check_benchmark(
        load(CheckBenchmarkConfig, [f"benchmark={name}", f"datasets_root={root}", "benchmark.name=mini", *more])
    )


def rewrite(file: Path, change: Callable[[list[list[str]]], object]) -> None:
    """Change the cells of a CSV file; row 1 is the header, as messages count."""
    rows = [[""], *(line.split(",") for line in file.read_text().splitlines())]
    change(rows)
    file.write_text("\n".join([",".join(row) for row in rows[1:]] + [""]))


def test_whole_downloads_have_no_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_benchmarks(str(tmp_path), num_places=2)
    for name in ("msls_val", "msls_test", "nordland_2760", "nordland_27592", "pitts30k_val", "sfxl_v2", "tokyo247"):
        assert check(tmp_path, name) == []
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [
        "mini: 4 queries",
        "mini: 8 database photos",
        "mini: 4 queries with positives (2 without were dropped)",
        "mini: 18 queries",  # the challenge: 6 cities, no ground truth
        "mini: 24 database photos",
    ]


def test_counts_are_compared_with_the_published_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_msls(str(tmp_path / "msls"), num_places=2)
    config = load(CheckBenchmarkConfig, ["benchmark=msls_val", f"datasets_root={tmp_path}"])
    assert check_benchmark(config) == [
        "msls_val: 4 queries; expected 740",
        "msls_val: 8 database photos; expected 18,871",
    ]
    assert "msls_val: 4 queries (740 expected)\n" in capsys.readouterr().out
    part = load(CheckBenchmarkConfig, ["benchmark=msls_val", "benchmark.subtask=n2o", f"datasets_root={tmp_path}"])
    assert check_benchmark(part) == []


def test_published_counts_are_those_of_the_method() -> None:
    counts = {name: (whole.num_queries, whole.num_database) for name, whole in WHOLE.items()}
    sfxl = 2_805_840
    assert counts == {
        "msls_val": (740, 18_871),
        "msls_test": (1_135, 36_565),
        "nordland_2760": (2_760, 27_592),
        "nordland_27592": (27_592, 27_592),
        "pitts30k_val": (7_608, 10_000),
        "pitts30k_test": (6_816, 10_000),
        "pitts250k_test": (8_280, 83_952),
        "tokyo247": (315, 75_984),
        "sfxl_v1": (1_000, sfxl),
        "sfxl_v2": (598, sfxl),
        "sfxl_night": (466, sfxl),
        "sfxl_occlusion": (76, sfxl),
    }
    assert set(WHOLE) <= set(PUBLIC)


def test_every_fault_at_once_is_found_in_one_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_msls(str(tmp_path / "msls"), num_places=4)
    cph, sf = (tmp_path / "msls" / "train_val" / city for city in ("cph", "sf"))
    keys = [line.split(",")[1] for line in (cph / "database" / "seq_info.csv").read_text().splitlines()]

    rewrite(cph / "database" / "postprocessed.csv", lambda rows: rows[4].__setitem__(2, "nan"))
    rewrite(cph / "database" / "raw.csv", lambda rows: rows[5].__setitem__(6, "perhaps"))
    (cph / "database" / "images" / f"{keys[5]}.jpg").unlink()
    (cph / "database" / "images" / f"{keys[6]}.jpg").write_bytes(b"\xff\xd8 cut short")
    for name in ("seq_info", "raw", "postprocessed"):
        rewrite(cph / "database" / f"{name}.csv", lambda rows: rows[9].__setitem__(1, rows[8][1]))
    raw = cph / "query" / "raw.csv"
    raw.write_text(raw.read_text()[:-50])
    rewrite(sf / "query" / "subtask_index.csv", lambda rows: rows[1].__setitem__(1, "everything"))
    (sf / "database" / "seq_info.csv").unlink()

    found = check(tmp_path, "msls_val")
    database, queries = cph / "database", cph / "query"
    assert found == [
        f"{database}/raw.csv, row 5: pano is 'perhaps'; expected True or False",
        f"{database}/postprocessed.csv, row 4: easting is 'nan'; expected a number",
        f"{database}/seq_info.csv, row 6: no photo 'images/{keys[5]}.jpg' in {database}",
        f"{database}/seq_info.csv, row 9: images/{keys[7]}.jpg again, as in {database}/seq_info.csv, row 8; "
        "expected each photo once",
        found[4],
        f"{queries}/raw.csv, row 8: 2 cells, expected 7",
        f"{queries}/raw.csv: its last whole row is 7; expected 8, as in {queries}/seq_info.csv",
        found[7],
        found[8],
    ]
    assert found[4].startswith(f"{sf}/database/seq_info.csv: no such file")
    assert found[7].startswith(f"{sf}/query/subtask_index.csv: no column all; expected all")
    assert found[8].startswith(f"{database}/images/{keys[6]}.jpg: ")
    assert found[8].endswith("; expected a photo")
    assert [line for line in capsys.readouterr().out.splitlines() if not line.startswith("mini: ")] == found

    config = load(CheckBenchmarkConfig, ["benchmark=msls_val", f"datasets_root={tmp_path}"])
    with pytest.raises(UserError) as caught:
        load_benchmark(config.benchmark, "unused")
    assert str(caught.value) == f"{found[0]} (and 7 more; pairvpr check_benchmark lists them)"  # photos aren't opened


def test_a_table_of_positions_with_every_fault(tmp_path: Path) -> None:
    write_named(str(tmp_path), num_places=2)
    names = sorted(path.name for path in (tmp_path / "database").iterdir())
    table = tmp_path / "positions.csv"
    table.write_text(
        "path,latitude,longitude\n"
        f"{names[0]},48.0,11.0\n{names[1]},95.0,11.0\n{names[2]},nan,11.0\nnobody.jpg,48.0,11.0\n{names[0]},48,11\n"
        f"{names[3]},48.0\n"
    )
    folders = [f"benchmark.{part}={tmp_path}/{part}" for part in ("database", "queries")]
    tables = ["benchmark.positions=table", f"benchmark.database_table={table}"]
    found = check(tmp_path, "folders", *folders, *tables)
    rows = {int(line.split(" row ")[1].split(":")[0]) for line in found}
    assert rows == {3, 4, 5, 6, 7}
    assert all(line.startswith(f"{table}, row ") for line in found)


def test_the_sample_is_seeded_and_as_large_as_asked(tmp_path: Path) -> None:
    root = tmp_path / "sped" / "images" / "test"
    write_named(str(root), num_places=6)
    for photo in (root / "database").iterdir():
        photo.write_bytes(b"no photo")
    assert check(tmp_path, "sped", "num_opened=0") == []
    five = check(tmp_path, "sped", "num_opened=5")
    assert five == check(tmp_path, "sped", "num_opened=5")
    assert len(five) == 5
    assert len(check(tmp_path, "sped")) == 12


def test_the_job_says_how_many_problems_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "sped" / "images" / "test"
    write_named(str(root), num_places=2)
    was_running = ray.is_initialized()
    line = ["check_benchmark", "benchmark=sped", f"datasets_root={tmp_path}"]
    monkeypatch.setattr(sys, "argv", line)
    assert run_job("check_benchmark") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "sped: no problems"
    next((root / "queries").iterdir()).write_bytes(b"")
    (root / "database" / "nowhere.jpg").touch()
    assert run_job("check_benchmark") == 1
    printed = capsys.readouterr()
    assert printed.err == "incomplete: sped: 2 problems, listed above\n"  # a name, and a photo that can't be opened
    monkeypatch.setattr(sys, "argv", [line[0], "benchmark=sped"])
    assert run_job("check_benchmark") == 2
    assert capsys.readouterr().err.startswith("error: missing: datasets_root=...")
    assert ray.is_initialized() == was_running


def test_a_benchmark_that_is_drawn_can_not_be_checked() -> None:
    with pytest.raises(UserError, match="benchmark=toy_city: it is generated by code; expected a downloaded benchmark"):
        check_benchmark(load(CheckBenchmarkConfig, ["benchmark=toy_city"]))


def test_photos_are_judged_by_the_limit_of_the_run(tmp_path: Path) -> None:
    write_named(str(tmp_path), num_places=2)
    folders = [f"benchmark.{part}={tmp_path}/{part}" for part in ("database", "queries")]
    large = sorted((tmp_path / "database").iterdir())[0]
    Image.new("1", (13_500, 13_500)).save(large, "PNG")
    (line,) = check(tmp_path, "folders", *folders)
    assert line.startswith(f"{large}: 13,500 x 13,500 pixels are 182.2 megapixels, more than model.max_megapixels=178;")
    assert check(tmp_path, "folders", *folders, "max_megapixels=183") == []
    with pytest.raises(UserError, match=r"max_megapixels=0: expected a number above 0"):
        check(tmp_path, "folders", *folders, "max_megapixels=0")


def test_what_is_odd_but_read_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_named(str(tmp_path), num_places=2)
    folders = [f"benchmark.{part}={tmp_path}/{part}" for part in ("database", "queries")]
    first, second, *_ = sorted((tmp_path / "database").iterdir())
    first.write_bytes(first.read_bytes().removesuffix(b"\xff\xd9"))
    values = np.linspace(7000, 7800, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(values).save(second, "PNG")
    assert check(tmp_path, "folders", *folders) == []
    said = [line for line in capsys.readouterr().out.splitlines() if "odd" in line]
    assert said == [f"2 of 4 opened photos are odd, but read; the first: {first}: no end marker"]
