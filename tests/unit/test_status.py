"""`pairvpr status`: a job that runs, one that is finished, stopped or killed, and directories of no job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pairvpr import cli, status
from pairvpr.data import sealed
from pairvpr.distributed.progress import Progress
from pairvpr.errors import UserError
from pairvpr.terminal import say

INTERVAL_S = 0.1


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "SECONDS_BETWEEN_SIGNS", INTERVAL_S)


def shown(output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["pairvpr", "status", str(output)])
    capsys.readouterr()
    code = cli.main()
    out, err = capsys.readouterr()
    return code, out, err


def test_a_job_that_runs_and_then_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with status.published(str(tmp_path), "evaluate"), Progress("re-rank", 300, "queries", already_done=100):
        say("s3://key:secret@host/bucket")
        for line in range(status.NUM_LINES):
            say(f"line {line}")
        deadline_s = time.monotonic() + 20
        while not ((found := status.read(str(tmp_path))) and found.lines) and time.monotonic() < deadline_s:
            time.sleep(0.01)
        code, out, err = shown(tmp_path, monkeypatch, capsys)
        assert (code, err) == (0, "")
        assert out.startswith("evaluate: running on ")
        assert f"process {os.getpid()}, for 0:00:0" in out
        assert out.splitlines()[1:] == [f"  line {line}" for line in range(status.NUM_LINES)]
    code, out, err = shown(tmp_path, monkeypatch, capsys)
    assert (code, err) == (0, "")
    assert out.startswith("evaluate: finished at ")
    assert out.splitlines()[-1].startswith("  re-rank: done in ")
    assert "secret" not in (tmp_path / status.FILE).read_text()
    assert [thread.name for thread in threading.enumerate() if thread.name == "status"] == []


def test_a_job_that_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError), status.published(str(tmp_path), "query"):
        raise UserError("index.path=x: of another model\nexpected ...")
    code, out, _ = shown(tmp_path, monkeypatch, capsys)
    assert code == 1
    assert out.startswith("query: stopped at ")
    assert out.splitlines()[-1] == "  index.path=x: of another model"


@pytest.mark.slow
@pytest.mark.parametrize("clock_is_off_by_s", [0, 3600, -3600])
def test_a_killed_job_shows_no_life_and_a_wrong_clock_deceives_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], clock_is_off_by_s: int
) -> None:
    """A job of a machine with a wrong clock runs while its file changes, and no longer."""
    code = f"""
import sys, time; from datetime import timedelta; from pairvpr import status
status.SECONDS_BETWEEN_SIGNS = {INTERVAL_S}
class Clock(status.datetime):
    @classmethod
    def now(cls, tz): return super().now(tz) + timedelta(seconds={clock_is_off_by_s})
status.datetime = Clock
with status.published(sys.argv[1], "build_index"):
    time.sleep(600)
"""
    monkeypatch.setattr(status, "SECONDS_BETWEEN_SIGNS", 1.0)  # so that a busy machine is not taken for a dead job
    job = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    try:
        deadline_s = time.monotonic() + 60
        while not (tmp_path / status.FILE).exists() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        exit_code, out, _ = shown(tmp_path, monkeypatch, capsys)
        assert (exit_code, out.partition(" on ")[0]) == (0, "build_index: running")
    finally:
        job.send_signal(signal.SIGKILL)
        job.wait()
    monkeypatch.setattr(status, "SECONDS_BETWEEN_SIGNS", INTERVAL_S)
    time.sleep(status.SIGNS_MISSED * INTERVAL_S)
    last = status.read(str(tmp_path))
    assert last is not None
    if not clock_is_off_by_s:  # signs have whole seconds, so one may seem younger than it is
        aged = replace(last, updated=(datetime.fromisoformat(last.updated) - timedelta(seconds=5)).isoformat())
        status.write(str(tmp_path), aged)
    exit_code, out, _ = shown(tmp_path, monkeypatch, capsys)
    assert exit_code == 1
    assert out.startswith("build_index: no sign of life since ")
    assert f"process {job.pid}" in out


def test_a_store_that_takes_nothing_stops_no_job(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with status.published(str(tmp_path / "file"), "evaluate"):
        say("on we go")


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        ({}, 2, "no job has written there; expected the output directory of a job"),
        ({"photo.jpg": "x"}, 2, "no job has written there"),
        ({"settings.json": "{}"}, 1, "a job of an earlier version began there, which left no status.json"),
        ({"settings.json": "{}", "metrics.json": "{}"}, 0, "finished (metrics.json there) by an earlier version"),
        ({"status.json": "{}"}, 2, "status.json is damaged: not a status (other entries)"),
        ({"status.json": "{"}, 2, "status.json is damaged: not JSON"),
    ],
)
def test_other_directories(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: dict[str, str],
    code: int,
    says: str,
) -> None:
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    found, out, err = shown(tmp_path, monkeypatch, capsys)
    assert found == code
    assert says in (err if code == 2 else out)
    assert (out + err).count("\n") == 1


def test_what_is_no_status_is_refused(tmp_path: Path) -> None:
    now = datetime.now(UTC).isoformat()
    good = status.Status(
        job="evaluate", state=status.State.running, host="here", process=1, started=now, updated=now, lines=["a"]
    )
    status.write(str(tmp_path), good)
    assert status.read(str(tmp_path)) == good
    for wrong in ({"state": "well"}, {"updated": "then"}, {"lines": "a"}, {"lines": [1]}, {"updated": now[:-6]}):
        sealed.write_json(str(tmp_path / status.FILE), asdict(good) | wrong)
        with pytest.raises(sealed.DamagedFileError, match="not a status"):
            status.read(str(tmp_path))
