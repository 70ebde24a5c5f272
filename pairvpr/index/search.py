"""The nearest rows of a shard, in an order that does not depend on how the rows are cut.

Q queries, G descriptor width, k results, n rows of a shard, S rows of a short list.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import faiss as faiss_module
import numpy as np
from numpy.typing import NDArray

from pairvpr.errors import UserError
from pairvpr.index.filters import Filters, Places, allowed
from pairvpr.index.merge import Found, merge_top_k
from pairvpr.index.threads import faiss_threads

faiss: Any = faiss_module  # its types lack what its Python wrappers add

QUERIES_PER_CALL = 1024
SPARE_ROWS = 32
"""Extra length of a short list beyond k, for ties, rounding and removed rows."""
NO_ID = -1
FLOAT32_STEP = 2.0**-23
MOST_ON_GPU = 2048
"""The longest list that faiss returns on a GPU."""
GPU_ROUNDS_MORE = "a GPU's distances are off by more than float32 rounds; the CPU searches this shard instead"
QUERY_BITS = 4
"""Bits that a query's values are rounded to before they are compared with one-bit codes."""


@dataclass(frozen=True)
class Effort:
    """Search effort of an approximate index: `num_probes` lists per query, `num_rescored` codes on its short list."""

    num_probes: int = 1
    num_rescored: int = 0


@dataclass(frozen=True, eq=False)
class Shard:
    """A faiss index and the image ids of its rows, ascending; `is_removed` (n,) if any photo is removed.

    `on_gpu` is a copy of a flat index that produces short lists; distances are still computed on the CPU. A GPU that
    rounds more than float32 does is noticed by them, and not asked again for these queries.
    """

    index: Any
    ids: NDArray[np.int64]
    is_removed: NDArray[np.bool_] | None = None
    on_gpu: Any = None

    @property
    def num_live(self) -> int:
        """Rows of photos that are not removed."""
        return len(self.ids) - (0 if self.is_removed is None else int(self.is_removed.sum()))


def flat_index(descriptors: NDArray[np.float32]) -> Any:
    """An exact faiss index (squared L2) over rows (n, G)."""
    index = faiss.IndexFlatL2(descriptors.shape[1])
    index.add(np.ascontiguousarray(descriptors))  # type: ignore[call-arg]
    return index


def search(
    shard: Shard,
    queries: NDArray[np.float32],
    k: int,
    *,
    num_threads: int,
    effort: Effort = Effort(),
    is_allowed: NDArray[np.bool_] | None = None,
    at_least: int | None = None,
    visits: Found | None = None,
) -> Found:
    """The k nearest live rows of each query (Q, G), fewer columns if there are fewer; equal distances by id.

    If `is_allowed` (n,) is given, only those rows count. In an index of lists, `effort.num_probes` lists are visited,
    and more while they hold fewer than `at_least` allowed rows (default k). A query that finds fewer than k rows is
    padded with id -1. `visits`, if known, are the lists (Q, probes) to visit first and the distances of their
    centroids: all shards of an index share them. For kinds with a short list, the result is that list, with approximate
    distances; `rescore` gives the exact ones.
    """
    assert np.isfinite(queries).all(), "a description refuses descriptors that are no numbers"
    num_wanted = min(k, shard.num_live if is_allowed is None else int((is_allowed & ~_removed(shard)).sum()))
    distances = np.empty((len(queries), num_wanted), np.float32)
    ids = np.empty((len(queries), num_wanted), np.int64)
    if num_wanted:
        selector = None if is_allowed is None else _selector(is_allowed & ~_removed(shard))
        wanted = _Wanted(num_wanted, min(at_least or k, num_wanted), selector)
        for first in range(0, len(queries), QUERIES_PER_CALL):
            block = slice(first, first + QUERIES_PER_CALL)
            some = np.ascontiguousarray(queries[block], np.float32)
            here = None if visits is None else (visits[0][block], visits[1][block])
            with faiss_threads(num_threads):
                distances[block], ids[block] = _search_block(shard, some, wanted, effort.num_probes, here)
    return distances, ids


def search_filtered(
    shard: Shard,
    queries: NDArray[np.float32],
    k: int,
    filters: Filters,
    places: Places,
    *,
    num_threads: int,
    effort: Effort = Effort(),
    at_least: int | None = None,
    visits: Found | None = None,
) -> Found:
    """As `search`, among the photos that each query's filter allows: (Q, k), padded with id -1 at infinite distance."""
    distances = np.full((len(queries), k), np.inf, np.float32)
    ids = np.full((len(queries), k), NO_ID, np.int64)
    for line, chosen in filters.groups():
        is_allowed = allowed(line, places, shard.ids)
        found = search(
            shard,
            queries[chosen],
            k,
            num_threads=num_threads,
            effort=effort,
            is_allowed=is_allowed,
            at_least=at_least,
            visits=None if visits is None else (visits[0][chosen], visits[1][chosen]),
        )
        columns = found[0].shape[1]
        distances[chosen, :columns], ids[chosen, :columns] = found
    return distances, ids


def _removed(shard: Shard) -> NDArray[np.bool_]:
    return np.zeros(len(shard.ids), np.bool_) if shard.is_removed is None else shard.is_removed


def _selector(is_allowed: NDArray[np.bool_]) -> Any:
    """faiss's name of a set of rows."""
    return faiss.IDSelectorBitmap(np.packbits(is_allowed, bitorder="little"))


@dataclass(frozen=True)
class _Wanted:
    """k rows of a query, `at_least` that many, among those of a selector."""

    k: int
    at_least: int
    selector: Any


def _search_block(
    shard: Shard, queries: NDArray[np.float32], wanted: _Wanted, num_probes: int, visits: Found | None = None
) -> Found:
    """Short lists that grow until they provably hold the k nearest allowed, live rows of each query.

    faiss keeps an arbitrary row among ties at the end of its list, and its rounding depends on a row's place in a
    block. So a list is long enough once its end is clearly farther than its k-th row.
    """
    k = wanted.k
    found = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    left = np.arange(len(queries))
    num_rows, num_asked = len(shard.ids), min(k + k // 8 + SPARE_ROWS, len(shard.ids))
    while len(left):
        theirs, rows, rounding = _short_lists(
            shard,
            queries[left],
            num_asked,
            num_probes,
            wanted.selector,
            None if visits is None else _rows(visits, left),
        )
        is_all = (rows[:, -1] < 0) | (num_asked == num_rows)
        horizon = np.where(is_all, np.inf, theirs[:, -1] - rounding)
        is_live = rows >= 0 if shard.is_removed is None else (rows >= 0) & ~shard.is_removed[rows]
        ours = _exact(shard, queries[left], theirs, rows, is_live)
        if shard.on_gpu is not None and (np.abs(theirs - ours) > rounding[:, None])[is_live].any():
            warnings.warn(GPU_ROUNDS_MORE, stacklevel=2)
            shard = replace(shard, on_gpu=None)
            continue
        distances, ids = merge_top_k([(ours, np.where(is_live, shard.ids[rows], NO_ID))], k)
        is_enough = ids[:, wanted.at_least - 1] != NO_ID
        is_done = np.where(is_all, is_enough, (ids[:, -1] != NO_ID) & (distances[:, -1] < horizon))
        found[0][left[is_done]], found[1][left[is_done]] = distances[is_done], ids[is_done]
        is_short_of_lists = is_all & ~is_enough  # those that were visited hold too few rows
        if is_short_of_lists.any():
            some = left[is_short_of_lists]
            _check_lists_left(shard, num_probes)
            found[0][some], found[1][some] = _search_block(shard, queries[some], wanted, 4 * num_probes)
        left = left[~is_done & ~is_short_of_lists]
        is_last_on_gpu = shard.on_gpu is not None and num_asked < MOST_ON_GPU < 4 * num_asked
        num_asked = min(MOST_ON_GPU if is_last_on_gpu else 4 * num_asked, num_rows)
    return found


def _check_lists_left(shard: Shard, num_probes: int) -> None:
    """All rows were seen and too few have a distance: some distance is NaN."""
    if num_probes >= getattr(shard.index, "nlist", 0):
        raise UserError("squared distances overflow float32; expected descriptors of about unit length")


def _rows(found: Found, rows: NDArray[np.int64]) -> Found:
    return found[0][rows], found[1][rows]


def _short_lists(
    shard: Shard,
    queries: NDArray[np.float32],
    num_asked: int,
    num_probes: int,
    selector: Any,
    visits: Found | None,
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
    """faiss's distances and rows (Q, S), and (Q,) the largest difference that a distance may have from ours."""
    if shard.on_gpu is not None and selector is None and num_asked <= MOST_ON_GPU:
        distances, rows = shard.on_gpu.search(queries, num_asked)
        return distances, rows, _rounding(queries, distances[:, -1])
    parameters = _parameters(shard, num_probes, selector)
    if visits is None:
        distances, rows = shard.index.search(queries, num_asked, params=parameters)
    else:
        distances, rows = _search_lists(shard.index, queries, num_asked, visits, parameters)
    if isinstance(shard.index, faiss.IndexFlat):
        return distances, rows, _rounding(queries, distances[:, -1])
    return distances, rows, np.zeros(len(queries), np.float32)


def _exact(
    shard: Shard,
    queries: NDArray[np.float32],
    distances: NDArray[np.float32],
    rows: NDArray[np.int64],
    is_live: NDArray[np.bool_],
) -> NDArray[np.float32]:
    """Distances (Q, S) of short lists, independent of a row's position; infinite where no live row stands."""
    if isinstance(shard.index, faiss.IndexFlat):
        query_of, place = np.nonzero(is_live)
        distances = np.empty(rows.shape, np.float32)
        distances[is_live] = _pair_distances(queries, query_of, shard.index.get_xb(), rows[query_of, place])
    return np.where(is_live, distances, np.float32(np.inf))


def _pair_distances(
    queries: NDArray[np.float32], query_of: NDArray[np.int64], rows: Any, chosen: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Squared distances (m,) of queries[query_of] to rows[chosen], each computed on its own; `rows` is a pointer."""
    queries = np.ascontiguousarray(queries, np.float32)
    query_of, chosen = np.ascontiguousarray(query_of), np.ascontiguousarray(chosen)
    distances = np.empty(len(chosen), np.float32)
    if len(chosen):
        faiss.pairwise_indexed_L2sqr(
            queries.shape[1],
            len(chosen),
            faiss.swig_ptr(queries),
            faiss.swig_ptr(query_of),
            rows,
            faiss.swig_ptr(chosen),
            faiss.swig_ptr(distances),
        )
    return distances


def _search_lists(index: Any, queries: NDArray[np.float32], num_asked: int, visits: Found, parameters: Any) -> Found:
    """Search in given lists; faiss's own Python method takes no parameters."""
    found = np.empty((len(queries), num_asked), np.float32), np.empty((len(queries), num_asked), np.int64)
    centres_away, lists = (np.ascontiguousarray(array) for array in visits)
    parameters.nprobe = lists.shape[1]
    inputs = (faiss.swig_ptr(queries), num_asked, faiss.swig_ptr(lists), faiss.swig_ptr(centres_away))
    index.search_preassigned_c(len(queries), *inputs, *(faiss.swig_ptr(array) for array in found), False, parameters)
    return found


def _rounding(queries: NDArray[np.float32], distances: NDArray[np.float32]) -> NDArray[np.float32]:
    """(Q,) rounding of |q|^2 + |x|^2 - 2qx, each a sum of G products, at rows x of these distances (Q,).

    Each sum errs by at most G rounding steps of the products' size. |x| is at most |q| + sqrt(distance).
    """
    step = (queries.shape[1] + 4) * FLOAT32_STEP
    length = np.linalg.norm(queries, axis=1)
    largest = (2 * length + np.sqrt(np.maximum(distances, 0))) ** 2
    return (step * largest).astype(np.float32)


def _parameters(shard: Shard, num_probes: int, selector: Any) -> Any:
    """faiss's search parameters for this kind of index."""
    if isinstance(shard.index, faiss.IndexIVFRaBitQ):
        return faiss.IVFRaBitQSearchParameters(nprobe=_probes(shard, num_probes), sel=selector, qb=QUERY_BITS)
    if isinstance(shard.index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(nprobe=_probes(shard, num_probes), sel=selector)
    return None if selector is None else faiss.SearchParameters(sel=selector)


def _probes(shard: Shard, num_probes: int) -> int:
    return min(num_probes, shard.index.nlist)


def rescore(
    descriptors: NDArray[np.float32],
    ids: NDArray[np.int64],
    queries: NDArray[np.float32],
    short_lists: NDArray[np.int64],
    *,
    num_threads: int,
) -> NDArray[np.float32]:
    """Exact squared distances (Q, S) of the entries of `short_lists` (Q, S) found in `ids` (n,); infinite elsewhere.

    `descriptors` (n, G) may be mapped: only the rows that are needed are read.
    """
    distances = np.full(short_lists.shape, np.inf, np.float32)
    if len(ids):
        query_of, place = np.nonzero((short_lists >= ids[0]) & (short_lists <= ids[-1]))
        wanted = short_lists[query_of, place]
        rows = np.searchsorted(ids, wanted)
        is_here = ids[rows] == wanted
        query_of, place, rows = query_of[is_here], place[is_here], rows[is_here]
        with faiss_threads(num_threads):
            distances[query_of, place] = _pair_distances(queries, query_of, faiss.swig_ptr(descriptors), rows)
    return distances
