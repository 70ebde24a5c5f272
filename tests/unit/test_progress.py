"""Progress: how long the rest takes, and no long silence."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import threading
import time
from types import FunctionType, SimpleNamespace

import pytest
import ray

from pairvpr import terminal
from pairvpr.distributed import progress as module
from pairvpr.distributed.progress import Progress
from tests.support.terminal import in_a_terminal, without_codes

pytestmark = pytest.mark.slow


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


STEP = """
import time
from pairvpr.distributed import progress
from pairvpr.terminal import heard_by, say

progress.SECONDS_BETWEEN_LINES = 0.2
heard = []
with heard_by(heard.append), progress.Progress(":eyes: re-rank", 400, "queries", already_done=100) as step:
    for number in range(4):
        step.add(50)
        time.sleep(0.3)
        if number == 1:
            say("a line with [brackets] and :eyes: in between")
print(len([line for line in heard if line.startswith(":eyes: re-rank: 2")]))
"""


def test_a_terminal_shows_a_bar() -> None:
    written, printed = in_a_terminal([sys.executable, "-c", STEP])
    plain = without_codes(written)
    assert re.search(r":eyes: re-rank .* 250/400 queries, \d+\.\d/s, left 0:00:\d\d", plain)
    assert "a line with [brackets] and :eyes: in between\r\n" in plain
    assert "re-rank: 250/400 queries" not in plain, "the bar says that"
    assert re.search(r"re-rank: done in \d\.\d s, \d+\.\d queries/s\r\n$", plain)
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l"), "the cursor is back"
    assert int(printed) >= 1, "listeners, such as the status, still hear how far the step is"


def test_a_line_reaches_a_bar_that_another_thread_ends_meanwhile() -> None:
    printed = list[str]()
    drawn = SimpleNamespace(console=SimpleNamespace(print=lambda line, **_: printed.append(line)))

    class Names(dict[str, object]):
        """Those of the module; the bar is gone once somebody has looked."""

        def __getitem__(self, name: str) -> object:
            found = super().__getitem__(name)
            if name == "_bar":
                self[name] = None
            return found

    FunctionType(terminal.say.__code__, Names(vars(terminal), _bar=drawn))("a line")
    assert printed == ["a line"]


def test_work_goes_on_when_the_terminal_is_closed() -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm"}
    child = subprocess.Popen([sys.executable, "-c", STEP], stderr=theirs, stdout=subprocess.PIPE, env=environment)
    os.close(theirs)
    assert os.read(ours, 100)
    os.close(ours)
    assert child.wait(60) == 0


def test_a_terminal_that_can_not_draw_gets_lines() -> None:
    written, _ = in_a_terminal([sys.executable, "-c", STEP], "dumb")
    assert "\x1b" not in written
    assert "re-rank: 250/400 queries, " in written
