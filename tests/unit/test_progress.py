"""Progress: how long the rest takes, and no long silence."""

from __future__ import annotations

import threading
import time

import pytest
import ray

from pairvpr.distributed import progress as module
from pairvpr.distributed.progress import Progress


def test_a_line_says_how_long_the_rest_takes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    now_s = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now_s[0])
    progress = Progress("re-rank", 400, "queries", already_done=100)
    now_s[0] += 20
    progress.add(100)
    assert capsys.readouterr().err.splitlines()[-1] == "re-rank: 200/400 queries, 5.0 queries/s, about 0:00:40 left"


def test_silence_is_broken_and_says_what_is_free(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked = threading.Event()

    def free() -> dict[str, float]:
        asked.set()
        return {"CPU": 1.5}

    monkeypatch.setattr(module, "SECONDS_OF_SILENCE", 0.2)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": 1.0})
    monkeypatch.setattr(ray, "available_resources", free)
    with Progress("re-rank", 400, "queries", already_done=96):
        assert asked.wait(20)
    first, quiet, *_, last = capsys.readouterr().err.splitlines()
    assert first == "re-rank: 400 queries (96 kept from an earlier run)"
    assert quiet == "re-rank: 96/400 queries, no more for 0 s (free in the cluster: 1.5 of 4 CPUs and 0 of 1 GPUs)"
    assert last.startswith("re-rank: done in ")


def test_without_ray_silence_is_broken_too_and_an_error_has_no_last_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    said = threading.Event()
    monkeypatch.setattr(module, "SECONDS_OF_SILENCE", 0.05)
    monkeypatch.setattr(module, "_free", lambda: said.set() or "")

    def work() -> None:
        with Progress("search", 2, "checkpoints"):
            assert said.wait(20)
            time.sleep(0.02)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "search: 0/2 checkpoints, no more for 0 s"
    assert not lines[-1].startswith("search: done")
    assert not [thread for thread in threading.enumerate() if thread.name == "progress of search"]
