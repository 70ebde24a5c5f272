"""The supervised pool, with actors that kill themselves."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
import ray

from pairvpr.distributed.pool import MAX_TRIES, PoolActor, SupervisedPool
from pairvpr.errors import IncompleteRunError

pytestmark = pytest.mark.usefixtures("local_ray")


@ray.remote(num_cpus=0.5)
class _Doubler(PoolActor):
    """Doubles its unit; dies at, or raises for, the ones it was told, on their first tries."""

    def __init__(self, folder: str, deaths: dict[int, int], errors: dict[int, int]) -> None:
        self.folder = Path(folder)
        self.deaths = deaths
        self.errors = errors

    def run(self, unit: int) -> int:
        tries = len(list(self.folder.glob(f"{unit}.*"))) + 1
        (self.folder / f"{unit}.{tries}").touch()
        if tries <= self.deaths.get(unit, 0):
            os._exit(1)
        if tries <= self.errors.get(unit, 0):
            raise ValueError(f"unit {unit} is bad")
        return 2 * unit


@ray.remote(num_cpus=0.5)
class _NeverStarts(PoolActor):
    def __init__(self) -> None:
        raise OSError("no such weights")


def _run(
    folder: Path, num_units: int, deaths: dict[int, int] | None = None, errors: dict[int, int] | None = None
) -> tuple[list[tuple[int, int]], dict[int, str]]:
    done: list[tuple[int, int]] = []
    with SupervisedPool[int](lambda: _Doubler.remote(str(folder), deaths or {}, errors or {}), 2, "test") as pool:
        failed = pool.run({unit: unit for unit in range(num_units)}, lambda key, result: done.append((key, result)))
    return done, failed


def test_every_unit_once_though_actors_die(tmp_path: Path) -> None:
    done, failed = _run(tmp_path, 40, deaths={3: 1, 4: 2, 20: 1, 39: 2})
    assert not failed
    assert sorted(done) == [(unit, 2 * unit) for unit in range(40)]


def test_a_unit_that_always_kills_is_named_and_the_rest_is_done(tmp_path: Path) -> None:
    done, failed = _run(tmp_path, 12, deaths={5: 99})
    assert sorted(key for key, _ in done) == [unit for unit in range(12) if unit != 5]
    assert set(failed) == {5}
    tries = Counter(int(file.name.split(".")[0]) for file in tmp_path.iterdir())
    assert tries[5] == MAX_TRIES
    assert max(count for unit, count in tries.items() if unit != 5) == 1  # nobody else ran twice, nobody was blamed


def test_an_exception_is_tried_again_then_named(tmp_path: Path) -> None:
    done, failed = _run(tmp_path, 8, errors={1: 2, 6: 99})
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
