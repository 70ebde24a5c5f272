"""The small inputs after public bug reports, each looked at by `check_benchmark` as a user would."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pairvpr.config.compose import load
from pairvpr.config.schema import CheckBenchmarkConfig
from pairvpr.data.benchmarks.check import check_benchmark
from tests.support.shared import SHARED, needs_shared

pytestmark = pytest.mark.slow

CASES = SHARED / "cases"
WHOLE: Sequence[str] = ()
BLANK = "CASE/q/{}.jpg: GPSLongitudeRef is '\\x00'; expected E or W"
LOOKS: dict[str, tuple[Sequence[str], Sequence[str], Sequence[str]]] = {
    "gps_blank_ref": (["benchmark.positions=exif"], [BLANK.format(number) for number in range(3)], []),
    "png_big_profile": ([], WHOLE, ["6 database photos", "3 queries with positives"]),
    "jpeg_no_eoi": (
        [],
        WHOLE,
        ["3 of 6 opened photos are odd, but read; the first: CASE/db/@500000.00@4180000.00@0@.jpg: no end marker"],
    ),
    "thermal_16bit": (
        [],
        WHOLE,
        ["12 of 12 opened photos are odd, but read; the first: CASE/db/@500000.00@4180000.00@0@.png: narrow 16-bit"],
    ),
    "heic_tif_ignored": ([], WHOLE, ["5 database photos", "1 file of another kind takes no part (1 .heic)"]),
    "mac_hidden": ([], WHOLE, ["6 database photos"]),
    "fixed_later": (
        [],
        ["CASE/db/@500100.00@4180000.00@1@.jpg: OSError: Truncated File Read; expected a photo"],
        ["2 of 3 queries are database photos, too, and each finds itself"],
    ),
    "gone_later": ([], WHOLE, ["6 database photos"]),
}
"""What is added to the line, every problem, and parts of what else is said."""
TABLES = ["dot_slash", "nfc_folder_nfd", "header_spaces", "cp1252", "upper_ext", "semicolons", "sep_line"]


def look(case: str, *line: str) -> list[str]:
    """The problems of a case, whose folder is called CASE in the line and in the problems."""
    folder = CASES / case
    words = ["benchmark=folders", "benchmark.database=CASE/db", "benchmark.queries=CASE/q", *line]
    found = check_benchmark(load(CheckBenchmarkConfig, [word.replace("CASE", str(folder)) for word in words]))
    return [problem.replace(str(folder), "CASE") for problem in found]


@needs_shared
@pytest.mark.parametrize("case", LOOKS)
def test_a_folder_of_photos(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    line, problems, said = LOOKS[case]
    assert look(case, "benchmark.radius_m=25", *line) == list(problems)
    printed = "".join(capsys.readouterr()).replace(str(CASES / case), "CASE")
    for words in said:
        assert words in printed, printed


@needs_shared
def test_a_panorama() -> None:
    (problem,) = look("pano_16k")
    assert problem == (
        "CASE/db/pano.png: 20,992 x 10,496 pixels are 220.3 megapixels, more than model.max_megapixels=178; "
        "expected a photo"
    )
    assert look("pano_16k", "max_megapixels=221") == []


@needs_shared
@pytest.mark.parametrize("case", TABLES)
def test_a_table_with_one_reading(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    tables = ["benchmark.positions=table", "benchmark.database_table=CASE/db.csv", "benchmark.queries_table=CASE/q.csv"]
    assert look(f"csv_{case}", "benchmark.radius_m=25", *tables) == []
    printed = capsys.readouterr().out
    assert "folders: 4 database photos\n" in printed
    assert "folders: 2 queries with positives\n" in printed


@needs_shared
@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("mat_v73/pitts30k_test.mat", "a MATLAB 7.3 (HDF5) file"),
        ("damaged_uncompressed.mat", "not a MATLAB file, or a damaged one: "),
    ],
)
def test_a_list_of_matlab(file: str, words: str) -> None:
    line = ["benchmark=pitts30k_test", f"benchmark.root={CASES}/mat_v73", f"benchmark.db_struct={CASES}/{file}"]
    (problem,) = check_benchmark(load(CheckBenchmarkConfig, line))[:1]
    assert problem.startswith(f"{CASES}/{file}: {words}")


@needs_shared
def test_no_case_is_left_out() -> None:
    others = {"pano_16k", "mat_v73", "damaged_uncompressed.mat", "README.md"}
    assert {path.name for path in CASES.iterdir()} == {*LOOKS, *others, *(f"csv_{case}" for case in TABLES)}
