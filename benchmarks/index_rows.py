"""Descriptors for benchmarks of an index, drawn rather than described, and their exact nearest in float64.

A 48-dimensional Gaussian mixture of 2,000 centres, embedded linearly, plus noise, on the unit sphere. A query is a row
of it seen again: a little elsewhere in the 48 dimensions, under other noise. n rows, Q queries, G = 512 values a row, k
results.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUM_VALUES, NUM_INNER, NUM_CENTRES = 512, 48, 2000
NOISE, SHIFT_OF_A_QUERY = 1.5, 0.5
ROWS_AT_ONCE = 50_000
LARGEST_TIE = 1e-6
"""Squared distances on the unit sphere that float32 can't tell apart for sure."""


@dataclass(frozen=True)
class Drawn:
    """Files of a folder: rows of the index (n, G), rows that are added later, queries (Q, G)."""

    folder: Path
    num_rows: int
    num_added: int
    num_queries: int

    @property
    def rows_file(self) -> Path:
        """Alone in its folder: that is what autofaiss reads."""
        return self.folder / "rows" / "rows.npy"

    @property
    def added_file(self) -> Path:
        """Ids of these rows follow those of the others."""
        return self.folder / "added.npy"

    @property
    def queries_file(self) -> Path:
        """As .npy, too."""
        return self.folder / "queries.npy"


class _Mixture:
    """Draws points of the inner space, and embeds them."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self.embedding = random.standard_normal((NUM_INNER, NUM_VALUES), dtype=np.float32)
        self.centres = random.standard_normal((NUM_CENTRES, NUM_INNER), dtype=np.float32)

    def inner(self, random: np.random.Generator, count: int) -> NDArray[np.float32]:
        """Points (count, 48)."""
        around = self.centres[random.integers(0, NUM_CENTRES, count)]
        return random.standard_normal((count, NUM_INNER), dtype=np.float32) + around

    def embedded(self, random: np.random.Generator, inner: NDArray[np.float32]) -> NDArray[np.float32]:
        """Unit rows (n, G)."""
        rows = inner @ self.embedding + NOISE * random.standard_normal((len(inner), NUM_VALUES), dtype=np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def draw(drawn: Drawn) -> bool:
    """Draw the files, unless they are there: then False."""
    marker = drawn.folder / "drawn.json"
    wanted = {name: value for name, value in asdict(drawn).items() if name != "folder"}
    if marker.exists() and json.loads(marker.read_text()) == wanted:
        return False
    marker.unlink(missing_ok=True)
    drawn.rows_file.parent.mkdir(parents=True, exist_ok=True)
    mixture, random = _Mixture(), np.random.default_rng(2)
    seen = np.sort(random.choice(drawn.num_rows, drawn.num_queries, replace=False))
    inner = _draw_rows(drawn.rows_file, drawn.num_rows, 1, mixture, seen)
    _draw_rows(drawn.added_file, drawn.num_added, 3, mixture, seen[:0])
    inner += SHIFT_OF_A_QUERY * random.standard_normal(inner.shape, dtype=np.float32)
    np.save(drawn.queries_file, random.permutation(mixture.embedded(random, inner)))
    marker.write_text(json.dumps(wanted))
    return True


def _draw_rows(file: Path, num_rows: int, seed: int, mixture: _Mixture, seen: NDArray[np.int64]) -> NDArray[np.float32]:
    """Write rows (n, G), piece by piece; the inner points of the rows `seen` (ascending)."""
    kept = [np.empty((0, NUM_INNER), np.float32)]
    with file.open("wb") as sink:
        header = {"descr": "<f4", "fortran_order": False, "shape": (num_rows, NUM_VALUES)}
        np.lib.format.write_array_header_1_0(sink, header)
        for number, first in enumerate(range(0, num_rows, ROWS_AT_ONCE)):
            random, stop = np.random.default_rng([seed, number]), min(first + ROWS_AT_ONCE, num_rows)
            inner = mixture.inner(random, stop - first)
            mixture.embedded(random, inner).tofile(sink)
            kept.append(inner[seen[(seen >= first) & (seen < stop)] - first])
    return np.concatenate(kept)


class Collection:
    """Rows of several .npy files; an id counts through them."""

    def __init__(self, files: Sequence[Path], counts: Sequence[int]) -> None:
        """The first `counts` rows of each file."""
        self._arrays = [
            np.load(file, mmap_mode="r", allow_pickle=False)[:count] for file, count in zip(files, counts, strict=True)
        ]

    def pieces(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """The first id of some rows, and the rows."""
        base = 0
        for array in self._arrays:
            for first in range(0, len(array), ROWS_AT_ONCE):
                yield base + first, np.asarray(array[first : first + ROWS_AT_ONCE])
            base += len(array)

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """(m, G) of the photos `ids` (m,)."""
        bounds = [0, *itertools.accumulate(map(len, self._arrays))]
        found = np.empty((len(ids), NUM_VALUES))
        for array, first, stop in zip(self._arrays, bounds, bounds[1:], strict=False):
            is_here = (ids >= first) & (ids < stop)
            found[is_here] = array[ids[is_here] - first]
        return found


def nearest(
    files: Sequence[Path], counts: Sequence[int], queries: NDArray[np.float32], k: int, gone: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Ids (Q, k) of the nearest by brute force in float64, without those `gone`; equal distances by id."""
    wide = queries.astype(np.float64)
    best = np.empty((len(queries), 0)), np.empty((len(queries), 0), np.int64)
    for first, rows in Collection(files, counts).pieces():
        piece = rows.astype(np.float64)
        squared = (wide**2).sum(1)[:, None] + np.einsum("ng,ng->n", piece, piece) - 2 * wide @ piece.T
        squared[:, gone[(gone >= first) & (gone < first + len(rows))] - first] = np.inf
        chosen = np.argpartition(squared, min(k, len(rows) - 1), axis=1)[:, :k]
        distances = np.concatenate([best[0], np.take_along_axis(squared, chosen, 1)], axis=1)
        ids = np.concatenate([best[1], first + chosen], axis=1)
        order = np.lexsort((ids, distances), axis=1)[:, :k]
        best = np.take_along_axis(distances, order, 1), np.take_along_axis(ids, order, 1)
    return best[1]


@dataclass(frozen=True)
class Difference:
    """Of two answers (Q, k): positions that hold other ids, and how far their distances are apart at most."""

    num_positions: int
    num_different: int
    largest_gap: float
    num_repeated: int

    @property
    def is_equal(self) -> bool:
        """But for ties of float32."""
        return self.largest_gap < LARGEST_TIE and not self.num_repeated

    def __str__(self) -> str:
        if not self.num_different:
            return f"all {self.num_positions:,} positions hold the same ids"
        return (
            f"{self.num_different:,} of {self.num_positions:,} positions hold other ids, whose squared distances (in "
            f"float64) differ by {self.largest_gap:.1e} at most"
        )


def difference(
    files: Sequence[Path],
    counts: Sequence[int],
    queries: NDArray[np.float32],
    ours: NDArray[np.int64],
    theirs: NDArray[np.int64],
) -> Difference:
    """Two answers, position by position."""
    query_of, place = np.nonzero(ours != theirs)
    collection, wide = Collection(files, counts), queries.astype(np.float64)[query_of]
    squared = [((collection.rows(ids[query_of, place]) - wide) ** 2).sum(1) for ids in (ours, theirs)]
    gaps: Any = np.abs(squared[0] - squared[1])
    num_repeated = sum(len(line) - len(np.unique(line)) for line in ours)
    return Difference(ours.size, len(query_of), float(gaps.max(initial=0.0)), num_repeated)
