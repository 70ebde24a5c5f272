"""The two inputs after public bug reports that change between a run and the next."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.support.runs import run_job
from tests.support.shared import SHARED, needs_shared

pytestmark = [pytest.mark.soak, needs_shared]


@pytest.fixture
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHARED / "cases" / request.param, tmp_path / "case"))


def run(job: str, *line: str) -> tuple[int, str]:
    """Exit code and all that a job printed."""
    done = run_job(job, ["model=tiny", "cluster.num_cpus=2", *line])
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("case", ["fixed_later"], indirect=True)
def test_a_rejected_photo_that_was_fixed(case: Path, tmp_path: Path) -> None:
    """The same line says how it is taken in, and that works."""
    build = [f"database={case}/db", f"output={tmp_path}/index"]
    code, printed = run("build_index", *build)
    assert (code, "generation 1, 5 photos" in printed) == (0, True)
    fixed = case / "db" / "@500100.00@4180000.00@1@.jpg"
    shutil.copy(case / "db" / "@500200.00@4180000.00@2@.jpg", fixed)
    code, printed = run("build_index", *build)
    assert (code, f"the first is {fixed.name}" in printed) == (2, True)
    (tmp_path / "FILE.txt").write_text(fixed.name)
    told = re.search(r"update_index (index\.path=\S+) add=FILE", printed)
    assert told is not None
    code, printed = run("update_index", told[1], f"add={tmp_path}/FILE.txt")
    assert (code, "generation 2, 6 photos" in printed) == (0, True)


@pytest.mark.parametrize("case", ["gone_later"], indirect=True)
def test_a_candidate_that_is_gone(case: Path, tmp_path: Path) -> None:
    assert run("build_index", f"database={case}/db", f"output={tmp_path}/index")[0] == 0
    gone = case / "db" / "@500000.00@4180000.00@0@.jpg"
    gone.unlink()
    asked = [f"index.path={tmp_path}/index", f"queries={case}/q", f"output={tmp_path}/out", "rerank.num_candidates=5"]
    code, printed = run("query", *asked)
    assert (code, f"unscored candidates 1: {gone.name}: " in printed) == (0, True)
    scores = pq.read_table(tmp_path / "out" / "predictions.parquet").column("pair_scores").to_pylist()
    assert [len(row) for row in scores] == [5, 5, 5]
    assert all(score > float("-inf") for row in scores for score in row[:4])
