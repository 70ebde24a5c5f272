"""Public benchmarks in miniature, as one line runs them: several over one index, and a challenge to submit to."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pairvpr.config.compose import load_evaluations
from pairvpr.evaluation.compare import main
from pairvpr.toy.benchmarks import write_msls, write_sfxl_test
from ray_jobs.evaluate import evaluate
from tests.support.runs import ONE_THREAD, SMALL_NETWORK

pytestmark = pytest.mark.usefixtures("local_ray")


def test_sfxl_runs_over_one_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two of the four tests; that the experiment names all of them is shown without Ray."""
    write_sfxl_test(f"{tmp_path}/sf_xl", num_places=3)
    line = ["experiment=sfxl_speed", f"datasets_root={tmp_path}", f"output={tmp_path}/out", *SMALL_NETWORK, *ONE_THREAD]
    line += ["benchmarks=[sfxl_v1,sfxl_night]", "rerank.num_candidates=4", "rerank.report_candidates=[2,4]"]
    reports = evaluate(load_evaluations(line))
    printed = capsys.readouterr()
    assert [report["benchmark"] for report in reports] == ["sfxl_v1", "sfxl_night"]
    first, second = (report["protocol"] for report in reports)
    assert first["database_paths_sha256"] == second["database_paths_sha256"]
    assert first["queries_paths_sha256"] != second["queries_paths_sha256"]
    assert {(protocol["num_queries"], protocol["num_database"]) for protocol in (first, second)} == {(3, 6)}
    assert {tuple(report["audit"]["by_num_candidates"]) for report in reports} == {("2", "4")}
    assert [path.relative_to(tmp_path / "out").parts[0] for path in tmp_path.rglob("index.faiss")] == ["index"]
    assert (tmp_path / "out" / "index" / "manifest.json").is_file()
    assert (printed.out + printed.err).count("index: finished earlier, skipped") == 1
    assert main([f"{tmp_path}/out/sfxl_v1", f"{tmp_path}/out/sfxl_night"]) == 2
    assert "are different tests, so their numbers can't be compared: queries_paths_sha256: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "is_published", [pytest.param(False, id="no truth", marks=pytest.mark.soak), pytest.param(True, id="truth")]
)
def test_a_challenge_gets_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], is_published: bool) -> None:
    write_msls(f"{tmp_path}/msls", num_places=1, test_has_positions=is_published)
    line = ["benchmark=msls_test", f"datasets_root={tmp_path}", f"output={tmp_path}/out", *SMALL_NETWORK, *ONE_THREAD]
    (report,) = evaluate(load_evaluations([*line, "rerank.num_candidates=5"]))
    assert (report["recall"] is None) == (report["audit"] is None) == (not is_published)
    assert report["model"]["attention"].startswith("torch's ")
    printed = capsys.readouterr()
    assert printed.err.count(f"re-rank: attention by {report['model']['attention']}\n") == 1
    assert "predictions.parquet, submission_global.txt, submission_reranked.txt, metrics.json" in printed.out
    rows = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pylist()
    keys = [Path(path).stem for path in pq.read_table(tmp_path / "out/index/images.parquet")["path"].to_pylist()]
    for name, column in (("global", "candidates"), ("reranked", "reranked")):
        lines = (tmp_path / "out" / f"submission_{name}.txt").read_text().splitlines()
        assert lines == [
            " ".join([Path(row["query_path"]).stem, *(keys[image_id] for image_id in row[column][:20])]) for row in rows
        ]
        assert {len(line.split()) for line in lines} == {1 + min(20, len(rows[0][column]))}
        if is_published:
            right = [row[column][0] in row["positives"] for row in rows]
            which = {"candidates": "global", "reranked": "reranked"}[column]
            assert report["recall"][which]["1"] == pytest.approx(100 * sum(right) / len(right))
