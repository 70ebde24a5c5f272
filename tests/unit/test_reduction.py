"""PCA with whitening: what numpy's SVD gives, the same bytes however rows are cut, and sets that can't be reduced."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pairvpr.errors import UserError
from pairvpr.index import reduction
from pairvpr.index.reduction import check_width, learnt


def drawn(num_rows: int, width: int, seed: int = 0) -> NDArray[np.float32]:
    """Rows that spread unequally around a mean that is not zero."""
    rng = np.random.default_rng(seed)
    spread = rng.normal(size=(num_rows, width)) * np.geomspace(1, 0.05, width) + rng.normal(size=width)
    return (spread @ np.linalg.qr(rng.normal(size=(width, width)))[0]).astype(np.float32)


def pieces_of(rows: NDArray[np.float32], step: int) -> Iterator[NDArray[np.float32]]:
    return (rows[first : first + step] for first in range(0, len(rows), step))


def by_svd(rows: NDArray[np.float32], reduce_to: int) -> NDArray[np.float64]:
    """Whitened projections of unit length, up to the signs of the columns."""
    centred = rows.astype(np.float64) - rows.astype(np.float64).mean(axis=0)
    left = np.linalg.svd(centred, full_matrices=False)[0][:, :reduce_to] * np.sqrt(len(rows) - 1)
    return left / np.linalg.norm(left, axis=1, keepdims=True)


def distances(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.linalg.norm(rows[:, None] - rows, axis=2)


@pytest.mark.parametrize(
    ("num_rows", "width", "reduce_to", "most_gram_bytes"),
    [(400, 40, 12, None), (400, 40, 40, None), (60, 300, 20, None), (60, 300, 20, 0), (60, 8448, 32, None)],
)
def test_projections_are_as_far_apart_as_those_of_an_svd(
    monkeypatch: pytest.MonkeyPatch, num_rows: int, width: int, reduce_to: int, most_gram_bytes: int | None
) -> None:
    if most_gram_bytes is not None:
        monkeypatch.setattr(reduction, "MOST_GRAM_BYTES", most_gram_bytes)
    rows = drawn(num_rows, width) if width < 1000 else np.tile(drawn(num_rows, 264), (1, 32)) ** 3
    found = learnt(pieces_of(rows, 7), num_rows, width, reduce_to)(rows).astype(np.float64)
    np.testing.assert_allclose(distances(found), distances(by_svd(rows, reduce_to)), atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


LEARNT = learnt(pieces_of(drawn(200, 33), 50), 200, 33, 9)
ROWS = drawn(200, 33, seed=1)
TOGETHER = LEARNT(ROWS)


@given(first=st.integers(0, 199), size=st.integers(0, 200))
def test_a_row_has_the_same_bytes_among_any_others(first: int, size: int) -> None:
    some = slice(first, first + size)
    assert LEARNT(ROWS[some]).tobytes() == TOGETHER[some].tobytes()


@pytest.mark.parametrize(("num_rows", "num_directions"), [(5, 4), (100, 6), (1, 0)])
@pytest.mark.parametrize("most_gram_bytes", [0, 1 << 20])
def test_more_directions_than_there_are(
    monkeypatch: pytest.MonkeyPatch, num_rows: int, num_directions: int, most_gram_bytes: int
) -> None:
    monkeypatch.setattr(reduction, "MOST_GRAM_BYTES", most_gram_bytes)
    rows = np.zeros((num_rows, 120), np.float32)
    rows[:, :6] = np.random.default_rng(0).normal(size=(num_rows, 6))
    message = f"index.reduce_to=7: {num_rows} sampled descriptors spread in {num_directions} directions only"
    with pytest.raises(UserError, match=message):
        learnt(iter([rows]), num_rows, 120, 7)


def test_more_values_than_there_are() -> None:
    check_width(512, 512)
    with pytest.raises(UserError, match=r"index\.reduce_to=513: descriptors have 512 values"):
        check_width(513, 512)
