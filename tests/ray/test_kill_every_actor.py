"""`make soak`: every class of actor of every job is killed again and again, at random moments, for the same results.

The classes are not listed here: Ray says which actors a job has while it runs undisturbed, Ray's own included.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private import state

from pairvpr.errors import IncompleteRunError
from tests.support.all_jobs import Case, all_cases

pytestmark = [pytest.mark.soak, pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(1500)]

NUM_KILLS = 20
LONGEST_RUN_S = 600.0
POLL_S = 0.02


@dataclass
class Killer:
    """Kills actors at random moments of their lives, at most `most` of a class in a run.

    The undisturbed run says how long the actors of a class live: some do for half a second. Of a longer life than
    `latest_s` only the beginning counts, or a run of many steps would see few kills.
    """

    latest_s: float
    most: int
    random: random.Random
    lives_s: dict[str, float] = field(default_factory=dict)
    hits: Counter[str] = field(default_factory=Counter)

    def watch(self, work: Callable[[], object]) -> None:
        """Do `work` undisturbed, and note which classes there are and how long their longest life is."""
        first_s: dict[int, float] = {}

        def look(name: str, pid: int) -> None:
            life_s = time.monotonic() - first_s.setdefault(pid, time.monotonic())
            self.lives_s[name] = max(life_s, self.lives_s.get(name, 0.0))

        _beside(work, look)

    def disturb(self, work: Callable[[], object]) -> float:
        """Do `work` while actors are killed; the seconds it took."""
        due_s: dict[int, float] = {}
        hits: Counter[str] = Counter()

        def kill(name: str, pid: int) -> None:
            life_s = min(self.latest_s, self.lives_s.setdefault(name, 0.0))
            now_s = time.monotonic()
            due = due_s.setdefault(pid, now_s + life_s * self.random.random())
            if hits[name] < self.most and self.hits[name] < NUM_KILLS and now_s >= due:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    hits[name] += 1
                    self.hits[name] += 1
                    due_s[pid] = math.inf  # Ray lists it until it notices

        return _beside(work, kill)

    def missing(self) -> dict[str, int]:
        """The classes that have not been killed often enough, and how often they have been."""
        return {name: self.hits[name] for name in sorted(self.lives_s) if self.hits[name] < NUM_KILLS}


def _beside(work: Callable[[], object], look: Callable[[str, int], None]) -> float:
    """Do `work`, and meanwhile `look` at class and process of every actor again and again; the seconds `work` took."""
    ended, started_s = threading.Event(), time.monotonic()

    def watch() -> None:
        while not ended.wait(POLL_S):
            for name, pid in _actors():
                look(name, pid)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work()
    finally:
        ended.set()
        thread.join()
    return time.monotonic() - started_s


def _actors() -> list[tuple[str, int]]:
    """Class and process of every actor that is alive."""
    return [
        (actor["ActorClassName"], actor["Pid"])
        for actor in state.actors().values()
        if actor["State"] == "ALIVE" and actor["Pid"]
    ]


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """A row for each class of each job, printed at the end."""
    rows = ["| job | class | kills |", "| --- | --- | ---: |"]
    yield rows
    print("\n" + "\n".join(rows))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return all_cases(tmp_path_factory.mktemp("jobs"))


@pytest.mark.parametrize(
    ("name", "latest_s", "most"),
    [
        ("build_index", 2.0, 3),
        ("update_index", 2.0, 3),
        ("evaluate, recompute", 1.5, 3),
        ("evaluate, cache", 1.5, 3),
        ("evaluate, store", 1.5, 3),
        ("query", 1.5, 3),
        ("plan", 2.0, 3),
        ("train_stage_one", 6.0, 4),
        ("train_stage_two", 6.0, 4),
        ("search_checkpoints", 2.0, 3),
    ],
)
def test_kills(name: str, latest_s: float, most: int, cases: dict[str, Case], table: list[str], tmp_path: Path) -> None:
    """A job, undisturbed and then with kills until every class has had enough: always the same result."""
    case, killer = cases[name], Killer(latest_s, most, random.Random(name))
    case.prepare(tmp_path / "undisturbed")
    killer.watch(lambda: case.run(tmp_path / "undisturbed"))
    expected, num_runs, longest_s = case.result(tmp_path / "undisturbed"), 0, 0.0
    while killer.missing():
        output = tmp_path / f"killed_{num_runs}"
        case.prepare(output)
        for _ in range(50):
            num_runs += 1
            try:
                longest_s = max(longest_s, killer.disturb(lambda output=output: case.run(output)))
                break
            except IncompleteRunError as error:
                print(f"{name}: {error}")
        assert case.result(output) == expected
        assert longest_s < LONGEST_RUN_S
        shutil.rmtree(output)
        print(f"{name}: {num_runs} runs, to be killed yet: {killer.missing()}", flush=True)
    table += [f"| {name} | `{one}` | {killer.hits[one]} |" for one in sorted(killer.lives_s)]
    table.append(f"| {name} | {num_runs} runs, the longest {longest_s:.0f} s | {sum(killer.hits.values())} |")


def test_ray_knows_every_class() -> None:
    """The look at Ray's actors is no stub: an actor made here is seen, with its process."""

    @ray.remote(num_cpus=0)
    class Seen:
        def pid(self) -> int:
            return os.getpid()

    actor: Any = Seen.remote()
    assert ("Seen", ray.get(actor.pid.remote())) in [(name.rsplit(".", 1)[-1], pid) for name, pid in _actors()]
