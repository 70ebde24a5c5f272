"""The pool's decisions, driven in virtual time by the simulated cluster: thousands of hours in a second, no Ray."""

from __future__ import annotations

import random

import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.simulate_cluster import START_S, Cluster, Step, run
from pairvpr.distributed.pool import LATE_FACTOR, SupervisedPool


@settings(max_examples=30)
@given(
    gpus=st.integers(1, 6),
    actors_each=st.integers(1, 3),
    units=st.integers(1, 80),
    seconds=st.floats(1, 60),
    straggling=st.floats(0, 0.5),
    lost_an_hour=st.floats(0, 10),
    seed=st.integers(0, 99),
)
def test_every_unit_is_done_once_whatever_is_lost_or_late(
    gpus: int, actors_each: int, units: int, seconds: float, straggling: float, lost_an_hour: float, seed: int
) -> None:
    """`run` itself demands every unit once, and none set aside: a machine's death is not the unit's fault."""
    found = run(Step("units", units, seconds, actors_each), gpus, straggling, lost_an_hour, seed)
    assert found.hours * 3600 >= START_S + units * seconds / (gpus * actors_each)
    assert not ray.is_initialized()


def test_without_faults_the_hours_are_the_work_over_the_actors() -> None:
    found = run(Step("units", 6400, 10.0, 4), 16, 0.0, 0.0)
    assert found.hours * 3600 == pytest.approx(START_S + 6400 * 10 / 64, rel=0.01)
    assert found.num_calls == 6400 + 64
    assert found.num_lost == 0


def test_nobody_waits_for_a_straggler_of_the_last_units() -> None:
    """The last unit is twenty times late on its first actor; the second try ends the run."""

    class OneStraggler(Cluster):
        sent = 0

        def taken(self, seconds: float) -> float:
            self.sent += 1
            return seconds * (20 if self.sent == 40 else 1)

    def hours(second_tries: bool) -> float:
        cluster = OneStraggler(4, 1, 0.0, 0.0, random.Random(0))
        with SupervisedPool[float](
            cluster.make_actor, 4, "units", second_tries=second_tries, transport=cluster
        ) as pool:
            assert pool.run(dict.fromkeys(range(40), 100.0), lambda _key, _result: None) == {}
        return cluster.virtual_s

    assert hours(second_tries=False) == pytest.approx(START_S + 9 * 100 + 20 * 100, abs=10)
    assert hours(second_tries=True) == pytest.approx(START_S + 9 * 100 + (LATE_FACTOR + 1) * 100, abs=10)


def test_lost_machines_cost_their_units_and_a_start() -> None:
    step = Step("units", 2000, 30.0, 1)
    quiet, lossy = run(step, 16, 0.0, 0.0), run(step, 16, 0.0, 1.0)
    assert lossy.num_lost > 5
    assert quiet.hours < lossy.hours < 1.5 * quiet.hours
