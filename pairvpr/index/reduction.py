"""Wide descriptors as fewer values: PCA with whitening, learnt from the described shards and stored with the index.

n rows, m sampled rows, G values of a described row, k values of a reduced one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pairvpr.data import sealed, storage
from pairvpr.errors import UserError
from pairvpr.index import build, descriptor_shards
from pairvpr.index.descriptor_shards import read_checked_array
from pairvpr.index.generations import IndexManifest, Reduced, ShardEntry, StoredFile
from pairvpr.index.make import Runner, finished_file, own_cache

ROWS_PER_VALUE, FEWEST_ROWS = 16, 1 << 16
"""Rows that are sampled: so many for each of the G values, and at least so many; all where there are no more."""
BYTES_AT_ONCE = 32 << 20
MOST_GRAM_BYTES = 512 << 20
"""Where the whole sample in float64 fits into this and has fewer rows than values, its m x m products are solved."""
ROWS_TOGETHER = 64
"""Rows of one matrix product, always: a row's result then does not depend on how many others there are."""
SMALLEST_SHARE = 1e-9
"""Of the largest variance. A direction with less is noise of the number format, which whitening would blow up."""


@dataclass(frozen=True, eq=False)
class Reduction:
    """`matrix` (G + 1, k) float64: the whitened components, and behind them what is added for the mean."""

    matrix: NDArray[np.float64]

    def __call__(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, G) -> (n, k) float32 of unit length. The same row gives the same bytes among any others."""
        reduced = np.empty((len(rows), self.matrix.shape[1]), np.float32)
        for first in range(0, len(rows), ROWS_TOGETHER):
            some = rows[first : first + ROWS_TOGETHER]
            block = np.zeros((ROWS_TOGETHER, rows.shape[1]))
            block[: len(some)] = some
            found = (block @ self.matrix[:-1] + self.matrix[-1])[: len(some)]
            lengths = np.sqrt((found * found).sum(axis=1, keepdims=True))
            reduced[first : first + ROWS_TOGETHER] = found / np.maximum(lengths, np.finfo(np.float64).tiny)
        return reduced


def learnt(pieces: Iterator[NDArray[np.float32]], num_rows: int, width: int, reduce_to: int) -> Reduction:
    """The reduction of `num_rows` sampled rows, which come in pieces.

    Raises `UserError` where the rows do not spread in as many directions as are wanted.
    """
    if num_rows < width and 8 * num_rows * width <= MOST_GRAM_BYTES:
        variances, components, mean = _from_products_of_rows(np.concatenate(list(pieces)).astype(np.float64))
    else:
        variances, components, mean = _from_covariance(pieces, width)
    order = np.argsort(variances)[::-1][:reduce_to]
    variances, components = variances[order], components[:, order]
    num_real = int((variances > SMALLEST_SHARE * variances[0]).sum()) if variances[0] > 0 else 0
    if num_real < reduce_to:
        raise UserError(
            f"index.reduce_to={reduce_to}: {num_rows:,} sampled descriptors spread in {num_real} directions only; "
            f"expected at most {num_real}, or more photos"
        )
    largest = np.abs(components).argmax(axis=0)
    components *= np.sign(components[largest, np.arange(reduce_to)])  # a direction and its opposite are equally good
    matrix = components / np.sqrt(variances)
    return Reduction(np.vstack([matrix, -mean @ matrix]))


Spread = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]
"""Variances (d,), their directions (G, d) of unit length, the mean (G,)."""


def _from_covariance(pieces: Iterator[NDArray[np.float32]], width: int) -> Spread:
    """Of any number of rows; G x G products are in memory."""
    count, shift = 0, np.zeros(width)
    total, products = np.zeros(width), np.zeros((width, width))
    for rows in pieces:
        if not count:
            shift = rows.mean(axis=0, dtype=np.float64)  # near the mean, so that little cancels below
        centred = rows - shift
        count += len(rows)
        total += centred.sum(axis=0)
        products += centred.T @ centred
    mean = total / count
    products -= np.outer(mean, total)
    products /= max(1, count - 1)
    variances, components = np.linalg.eigh(products)
    return variances, components, shift + mean


def _from_products_of_rows(rows: NDArray[np.float64]) -> Spread:
    """Of fewer rows than values: the same directions, from m x m products."""
    mean = rows.mean(axis=0)
    rows -= mean
    values, vectors = np.linalg.eigh(rows @ rows.T)
    values = np.maximum(values, 0)
    components = rows.T @ (vectors / np.sqrt(np.maximum(values, np.finfo(np.float64).tiny)))
    return values / max(1, len(rows) - 1), components, mean


def check_width(reduce_to: int | None, width: int) -> None:
    """Raise `UserError` where rows are to have more values than they are described with."""
    if reduce_to is not None and reduce_to > width:
        raise UserError(f"index.reduce_to={reduce_to}: descriptors have {width} values; expected at most that")


def reduced(directory: str, draft: IndexManifest, reduce_to: int, runner: Runner) -> IndexManifest:
    """The draft of a new index with reduced rows in place of the described ones, which stay where they are."""
    runner.say(f"index: learning to reduce {draft.descriptor_dim:,} values to {reduce_to:,} from a sample")
    (file,) = runner.run("", _learn, [(directory, draft, reduce_to)])
    reduction = Reduced(file=file, descriptor_dim=draft.descriptor_dim)
    shards = reduced_shards(directory, draft.shards, reduction, runner)
    return replace(draft, descriptor_dim=reduce_to, reduction=reduction, shards=shards)


def reduced_shards(
    directory: str, entries: Sequence[ShardEntry], reduction: Reduced | None, runner: Runner
) -> list[ShardEntry]:
    """Entries of described shards with reduced rows; as they are without a reduction."""
    if reduction is None:
        return list(entries)
    files = runner.run("reduce", _reduce_shard, [(directory, entry, reduction) for entry in entries])
    pairs = zip(entries, files, strict=True)
    return [replace(entry, files=entry.files | {"descriptors.npy": file}) for entry, file in pairs]


def read_reduction(directory: str, manifest: IndexManifest) -> Reduction | None:
    """What an index reduces queries by; None where it doesn't. Raises `UserError` for a damaged file."""
    if manifest.reduction is None:
        return None
    return Reduction(read_checked_array(directory, manifest.reduction.file, np.float64, 2))


def _learn(directory: str, draft: IndexManifest, reduce_to: int) -> StoredFile:
    about: list[Any] = [reduce_to, *(entry.files["descriptors.npy"].sha256 for entry in draft.shards)]
    path = f"reduction-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]}.npy"
    file = finished_file(directory, path)
    if file is None:
        urls = [storage.join(directory, entry.files["descriptors.npy"].path) for entry in draft.shards]
        counts, width = [entry.num_rows for entry in draft.shards], draft.descriptor_dim
        runs = build.spread_runs(sum(counts), max(ROWS_PER_VALUE * width, FEWEST_ROWS))
        pieces = (build.read_sample(urls, counts, some) for some in _cut(runs, max(1, BYTES_AT_ONCE // (4 * width))))
        found = learnt(pieces, sum(map(len, runs)), width, reduce_to)
        file = descriptor_shards.write_array(directory, path, found.matrix)
        sealed.write_json(storage.join(directory, f"{path}.json"), asdict(file))
    return file


def _cut(runs: Sequence[range], num_rows: int) -> Iterator[list[range]]:
    """Runs in groups of about so many rows."""
    group, size = list[range](), 0
    for run in runs:
        for first in range(run.start, run.stop, num_rows):
            group.append(range(first, min(first + num_rows, run.stop)))
            size += len(group[-1])
            if size >= num_rows:
                yield group
                group, size = [], 0
    if group:
        yield group


def _reduce_shard(directory: str, entry: ShardEntry, reduction: Reduced) -> StoredFile:
    path = f"{entry.path}/{reduction.file.path.replace('reduction-', 'reduced-', 1)}"
    file = finished_file(directory, path)
    if file is None:
        apply = Reduction(read_checked_array(directory, reduction.file, np.float64, 2))
        rows = entry.files["descriptors.npy"]
        with own_cache() as cache, cache.open(storage.join(directory, rows.path), rows.sha256, rows.bytes) as local:
            narrow, stop = np.empty((entry.num_rows, apply.matrix.shape[1]), np.float32), 0
            for piece in build.rows_of_file(local):
                first, stop = stop, stop + len(piece)
                narrow[first:stop] = apply(piece)
        file = descriptor_shards.write_array(directory, path, narrow)
        sealed.write_json(storage.join(directory, f"{path}.json"), asdict(file))
    return file
