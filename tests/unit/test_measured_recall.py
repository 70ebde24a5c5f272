"""`auto` asks what a finished index was measured to reach, not what its builder was asked for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pairvpr.index.measure import ROUNDED_BY, Effort, Step, as_measured, reached

TARGETS = st.floats(0.5, 0.999)


@given(recall=st.floats(0, 1), standard_error=st.floats(0, 0.1), target=TARGETS)
def test_a_kept_measurement_judges_as_the_measured_step(recall: float, standard_error: float, target: float) -> None:
    step = Step(Effort(), recall, standard_error)
    kept = as_measured(step, [step], target, 100, 10)
    if step.reaches(target):
        assert reached(kept, target)
    if reached(kept, target):  # rounding errs by so little
        assert Step(Effort(), recall + 2 * ROUNDED_BY, max(0.0, standard_error - 2 * ROUNDED_BY)).reaches(target)


@given(target=TARGETS)
def test_a_recall_below_the_target_is_not_reached_though_it_was_the_target(target: float) -> None:
    step = Step(Effort(), target - 0.01, 0.0)
    assert not reached(as_measured(step, [step], target, 100, 10), target)
