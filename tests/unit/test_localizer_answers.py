"""`Localizer.answer`: all that is known of one photo, in the time that its caller has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pairvpr import Localizer, PhotoError, RerankConfig, UserError, Utm
from pairvpr.deadline import Deadline, TooLateError
from pairvpr.where import Where
from tests.unit.test_localizer import FEW, OPTIONS, folder, localizer, queries

__all__ = ["folder", "localizer", "queries"]


def test_equals_locate(localizer: Localizer, queries: list[Path]) -> None:
    for photo in queries[:3]:
        answer = localizer.answer(photo.read_bytes(), k=4)
        assert answer.matches == localizer.locate(photo, k=4)
        assert (answer.generation, answer.confidence, answer.in_map) == (1, None, None)
        assert min(answer.seconds.decode, answer.seconds.describe, answer.seconds.search, answer.seconds.rerank) > 0


def test_fewer_candidates_equal_a_localizer_of_so_many(folder: Path, localizer: Localizer, queries: list[Path]) -> None:
    fewer = Localizer.open(folder / "index", **{**OPTIONS, "rerank": replace(FEW, num_candidates=3)})
    assert localizer.answer(queries[0], k=3, num_candidates=3).matches == fewer.locate(queries[0], k=3)
    with pytest.raises(UserError, match=r"num_candidates=7: expected 1 to rerank\.num_candidates=6"):
        localizer.answer(queries[0], num_candidates=7)
    with pytest.raises(UserError, match="k=3: expected 1 to num_candidates=2"):
        localizer.answer(queries[0], k=3, num_candidates=2)


def test_position_is_the_mean_of_what_is_near_the_best(localizer: Localizer, queries: list[Path]) -> None:
    """By hand: weights exp(score / 2), of the scored matches within 25 m of the best."""
    for photo in queries:
        answer = localizer.answer(photo, k=6)
        best = answer.matches[0].utm
        assert best is not None
        near = [match for match in answer.matches if match.utm and np.hypot(*np.subtract(match.utm, best)) <= 25]
        weights = np.exp([(match.pair_score - answer.matches[0].pair_score) / 2 for match in near])  # type: ignore[operator]
        metres = np.array([match.utm for match in near])
        mean_m = weights @ metres / weights.sum()
        spread_m = np.sqrt(weights @ ((metres - mean_m) ** 2).sum(1) / weights.sum())
        assert answer.position is not None
        assert np.allclose(answer.position.utm, mean_m)
        assert np.isclose(answer.position.spread_m, spread_m)


def test_nobody_is_near_where_nothing_was_found(localizer: Localizer, queries: list[Path]) -> None:
    answer = localizer.answer(queries[0], where=Where(near=Utm(9e5, 9e5), radius_m=1))
    assert (answer.matches, answer.position, answer.confidence) == ([], None, None)


def test_a_broken_photo_is_a_photo_error(localizer: Localizer) -> None:
    with pytest.raises(PhotoError, match="expected one of JPEG"):
        localizer.answer(b"no photo")


class Countdown(Deadline):
    """Over after so many checks."""

    def __init__(self, num_checks: int) -> None:
        super().__init__()
        self.left = num_checks

    def check(self) -> None:
        self.left -= 1
        if self.left < 0:
            self.cancel()
        super().check()


def test_work_stops_between_forward_passes(folder: Path, queries: list[Path]) -> None:
    """Each check lets at most one more photo through the network; the next answer is that of an undisturbed one."""
    rerank = RerankConfig(num_candidates=6, batch_size=1, num_threads_per_actor=1)
    localizer = Localizer.open(folder / "index", **{**OPTIONS, "rerank": rerank})
    whole = Countdown(1000)
    expected = Localizer.open(folder / "index", **{**OPTIONS, "rerank": rerank}).answer(queries[0], deadline=whole)
    num_checks = 1000 - whole.left
    assert num_checks == 1 + 1 + 6  # describe, search, each candidate
    features = localizer._network._features  # pyright: ignore[reportAttributeAccessIssue]
    for left in range(num_checks):
        with pytest.raises(TooLateError):
            localizer.answer(queries[0], deadline=Countdown(left))
        assert len(features._features) <= max(0, left - 1)
    assert localizer.answer(queries[0]).matches == expected.matches


def test_a_deadline_in_seconds(localizer: Localizer, queries: list[Path]) -> None:
    with pytest.raises(TooLateError):
        localizer.answer(queries[0], deadline=Deadline(0.0))
    deadline = Deadline(60.0)
    assert 59 < deadline.left_s <= 60
    localizer.answer(queries[0], deadline=deadline)
    deadline.cancel()
    assert deadline.left_s == 0


def test_refresh_to_a_generation_that_is_not_there(localizer: Localizer) -> None:
    assert not localizer.refresh(1)
    with pytest.raises(UserError, match=r"generation=7: .* expected 1 to 1"):
        localizer.refresh(7)
