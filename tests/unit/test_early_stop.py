"""When the scoring of a query's candidates stops, against the rule in words."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pairvpr.retrieval.early_stop import margin, stopped_after

SCORES = st.lists(st.floats(-9, 9, width=16), min_size=1, max_size=40)


@given(SCORES)
def test_the_margin_is_the_best_score(scores: list[float]) -> None:
    assert margin(np.array(scores, np.float32)) == sorted(scores)[-1]


@given(SCORES, st.integers(1, 45), st.floats(-10, 10))
def test_stops_at_the_end_of_the_round_that_has_a_score_beyond_the_threshold(
    scores: list[float], round_size: int, threshold: float
) -> None:
    beyond = [place for place, score in enumerate(scores) if score >= threshold]
    num_rounds = -(-len(scores) // round_size) if not beyond else beyond[0] // round_size + 1
    expected = min(num_rounds * round_size, len(scores))
    assert stopped_after(np.array(scores, np.float32), round_size, threshold) == expected


def test_no_candidates() -> None:
    assert stopped_after(np.empty(0, np.float32), 4, 0.0) == 0


def test_what_calibrates_needs_no_torch_and_no_ray() -> None:
    code = "import sys, ray_jobs.calibrate; sys.exit(bool({'torch', 'ray', 'faiss'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
