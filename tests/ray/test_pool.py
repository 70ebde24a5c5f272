"""The supervised pool, with actors that kill themselves or never end."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray

from pairvpr.distributed import pool as pool_module
from pairvpr.distributed.pool import MAX_TRIES, PoolActor, SupervisedPool
from pairvpr.errors import IncompleteRunError

pytestmark = pytest.mark.usefixtures("local_ray")

LONGEST_WAIT_S = 300.0
Waits = Mapping[tuple[int, int], tuple[str, float]]
"""By unit and try: a file to wait for, and seconds after that."""


@ray.remote(num_cpus=0.5)
class _Doubler(PoolActor):
    """Doubles its unit; dies at the ones it was told, on so many first tries of them.

    `errors` has the units and tries to raise for. Before all that, those of `waits` wait for a file, then some seconds.
    """

    def __init__(
        self, folder: str, deaths: Mapping[int, int], errors: Collection[tuple[int, int]], waits: Waits
    ) -> None:
        self.folder = Path(folder)
        self.deaths = deaths
        self.errors = errors
        self.waits = waits

    def run(self, unit: int) -> int:
        tries = len(list(self.folder.glob(f"{unit}.*"))) + 1
        (self.folder / f"{unit}.{tries}").touch()
        if (unit, tries) in self.waits:
            name, seconds = self.waits[unit, tries]
            self._wait_for(self.folder / name)
            time.sleep(seconds)
        if tries <= self.deaths.get(unit, 0):
            os._exit(1)
        if (unit, tries) in self.errors:
            raise ValueError(f"unit {unit} is bad")
        return 2 * unit

    @staticmethod
    def _wait_for(file: Path) -> None:
        deadline_s = time.monotonic() + LONGEST_WAIT_S
        while not file.exists():
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{file.name} never came")
            time.sleep(0.02)


@ray.remote(num_cpus=0.5)
class _NeverStarts(PoolActor):
    def __init__(self) -> None:
        raise OSError("no such weights")


class _Maker:
    """Makes the actors of a pool of `num_actors`; once the first replacement is ready, the file "replaced" appears."""

    def __init__(
        self,
        folder: Path,
        deaths: Mapping[int, int] | None = None,
        errors: Collection[tuple[int, int]] = (),
        waits: Waits | None = None,
        *,
        num_actors: int = 2,
    ) -> None:
        self.folder = folder
        self.arguments = str(folder), dict(deaths or {}), set(errors), dict(waits or {})
        self.num_actors = num_actors
        self.num_made = 0

    def __call__(self) -> Any:
        actor: Any = _Doubler.remote(*self.arguments)
        self.num_made += 1
        if self.num_made == self.num_actors + 1:
            ray.get(actor.node_id.remote())
            (self.folder / "replaced").touch()
        return actor

    def pool(self, *, second_tries: bool = True) -> SupervisedPool[int]:
        return SupervisedPool[int](self, self.num_actors, "test", second_tries=second_tries)


def _do(
    pool: SupervisedPool[int], *units: int, last: Path | None = None
) -> tuple[list[tuple[int, int]], dict[int, str]]:
    """What was done, in order, and what failed. The file `last` appears when one unit is left."""
    done: list[tuple[int, int]] = []

    def on_done(key: int, result: int) -> None:
        done.append((key, result))
        if last is not None and len(done) == len(units) - 1:
            last.touch()

    failed = pool.run({unit: unit for unit in units}, on_done)
    return done, failed


def _run(
    folder: Path,
    num_units: int,
    deaths: Mapping[int, int] | None = None,
    errors: Collection[tuple[int, int]] = (),
    waits: Waits | None = None,
) -> tuple[list[tuple[int, int]], dict[int, str]]:
    with _Maker(folder, deaths, errors, waits).pool() as pool:
        return _do(pool, *range(num_units))


def _doubled(*units: int) -> list[tuple[int, int]]:
    return [(unit, 2 * unit) for unit in units]


def _num_tries(folder: Path, unit: int) -> int:
    return len(list(folder.glob(f"{unit}.*")))


def _late_after(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(pool_module, "SECONDS_BEFORE_LATE", seconds)
    monkeypatch.setattr(pool_module, "WAIT_S", 0.1)


def test_every_unit_once_though_actors_die(tmp_path: Path) -> None:
    done, failed = _run(tmp_path, 40, deaths={3: 1, 4: 2, 20: 1, 39: 2})
    assert not failed
    assert sorted(done) == _doubled(*range(40))


def test_a_unit_that_always_kills_is_named_and_the_rest_is_done(tmp_path: Path) -> None:
    done, failed = _run(tmp_path, 12, deaths={5: 99})
    assert sorted(key for key, _ in done) == [unit for unit in range(12) if unit != 5]
    assert set(failed) == {5}
    assert [_num_tries(tmp_path, unit) for unit in range(12)] == [MAX_TRIES if unit == 5 else 1 for unit in range(12)]


def test_nobody_waits_while_a_node_may_be_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unit 0 kills its actor for good. The others begin with its last try, and are done before the verdict on it."""
    monkeypatch.setattr(pool_module, "SECONDS_TO_NOTICE_A_DEAD_NODE", verdict_s := 6.0)
    waits = {(unit, 1): (f"0.{MAX_TRIES}", 0.2) for unit in range(1, 9)}
    done_s: list[float] = []
    with _Maker(tmp_path, deaths={0: 99}, waits=waits, num_actors=3).pool() as pool:
        failed = pool.run({unit: unit for unit in range(9)}, lambda *_: done_s.append(time.time()))
    last_try_s = (tmp_path / f"0.{MAX_TRIES}").stat().st_mtime
    assert set(failed) == {0}
    assert len(done_s) == 8
    assert time.time() - last_try_s >= verdict_s
    assert max(done_s) - last_try_s < verdict_s


def test_an_exception_is_tried_again_then_named(tmp_path: Path) -> None:
    done, failed = _run(tmp_path, 8, errors={(1, 1), (1, 2), (6, 1), (6, 2), (6, 3)})
    assert sorted(key for key, _ in done) == [0, 1, 2, 3, 4, 5, 7]
    assert failed == {6: "ValueError: unit 6 is bad"}


def test_actors_that_cannot_start_end_the_run() -> None:
    with (
        SupervisedPool[int](_NeverStarts.remote, 2, "test") as pool,
        pytest.raises(IncompleteRunError, match="no actor can start: OSError: no such weights"),
    ):
        pool.run({0: 0}, lambda _key, _result: None)


def test_nothing_to_do(tmp_path: Path) -> None:
    assert _run(tmp_path, 0) == ([], {})


def test_a_late_unit_is_overtaken_by_one_actor_and_nobody_waits_for_the_loser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither this run nor the next one, in which the loser dies after the winner; that is then nobody's failure."""
    waits = {(0, 1): ("last", 0.0), (0, 2): ("0.1", 1.0), (9, 1): ("replaced", 1.0)}
    make = _Maker(tmp_path, deaths={0: 1}, waits=waits, num_actors=3)
    _late_after(monkeypatch, 0.2)
    with make.pool() as pool:
        done, failed = _do(pool, *range(6))
        assert (sorted(done), failed) == (_doubled(*range(6)), {})
        assert _num_tries(tmp_path, 0) == 2
        _late_after(monkeypatch, math.inf)
        done, failed = _do(pool, 0, 1, 9, last=tmp_path / "last")
    assert (sorted(done), failed) == (_doubled(0, 1, 9), {})
    assert make.num_made == 4


def test_the_next_run_is_done_beside_an_actor_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _late_after(monkeypatch, 0.2)
    with _Maker(tmp_path, waits={(0, 1): ("never", 0.0)}).pool() as pool:
        assert sorted(_do(pool, *range(6))[0]) == _doubled(*range(6))
        _late_after(monkeypatch, math.inf)
        assert sorted(_do(pool, *range(6))[0]) == _doubled(*range(6))
    assert _num_tries(tmp_path, 0) == 3


def test_a_loser_that_ends_during_the_run_is_not_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unit 0's first try ends when all but unit 1 are done, which keeps the run going for a second beyond that."""
    _late_after(monkeypatch, 0.2)
    waits = {(0, 1): ("last", 0.0)} | {(1, number): ("last", 1.0) for number in range(1, 9)}
    with _Maker(tmp_path, waits=waits, num_actors=3).pool() as pool:
        done, failed = _do(pool, *range(6), last=tmp_path / "last")
    assert (sorted(done), failed) == (_doubled(*range(6)), {})
    assert _num_tries(tmp_path, 0) == 2


@pytest.mark.parametrize("first_try_fails", [True, False])
def test_second_tries_fail_beside_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_try_fails: bool
) -> None:
    """They count, and end; the unit has failed when its first try has failed, too, and is done if that is done."""
    _late_after(monkeypatch, 0.2)
    last_try = 1 + MAX_TRIES
    errors = {(0, number) for number in range(1 if first_try_fails else 2, last_try + 1)}
    done, failed = _run(tmp_path, 6, errors=errors, waits={(0, 1): (f"0.{last_try}", 0.0)})
    assert sorted(done) == _doubled(*range(int(first_try_fails), 6))
    assert failed == ({0: "ValueError: unit 0 is bad"} if first_try_fails else {})
    assert _num_tries(tmp_path, 0) == last_try


def test_the_death_of_an_overtaken_actor_starts_no_third_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first try dies when the second one runs, which ends only when there is a new actor that could try it, too."""
    make = _Maker(tmp_path, deaths={0: 1}, waits={(0, 1): ("0.2", 0.0), (0, 2): ("replaced", 1.0)})

    def make_and_forbid_second_tries() -> Any:
        if make.num_made == 2:
            _late_after(monkeypatch, math.inf)
        return make()

    _late_after(monkeypatch, 0.2)
    with SupervisedPool[int](make_and_forbid_second_tries, 2, "test") as pool:
        done, failed = _do(pool, *range(6))
    assert (sorted(done), failed) == (_doubled(*range(6)), {})
    assert make.num_made == 3
    assert _num_tries(tmp_path, 0) == 2


def test_without_second_tries_a_unit_is_left_to_its_actor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _late_after(monkeypatch, 0.1)
    with _Maker(tmp_path, waits={(0, 1): ("5.1", 2.0)}).pool(second_tries=False) as pool:
        done, failed = _do(pool, *range(6))
    assert (sorted(done), failed) == (_doubled(*range(6)), {})
    assert [_num_tries(tmp_path, unit) for unit in range(6)] == [1] * 6
