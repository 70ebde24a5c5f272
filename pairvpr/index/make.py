"""Builds an index from described shards: faiss files shard by shard, the search effort, the next generation.

A `Runner` executes the work on shards: sequentially in this process, or as tasks on a cluster. Q queries, k results.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pairvpr.config.schema import BuildConfig, IndexKind
from pairvpr.data import sealed, storage
from pairvpr.data.local_cache import LocalCache
from pairvpr.data.manifest import Manifest
from pairvpr.errors import IncompleteRunError, UserError
from pairvpr.index import build, choose, descriptor_shards, measure
from pairvpr.index.build import IndexSpec
from pairvpr.index.generations import ImageTable, IndexManifest, ShardEntry, StoredFile
from pairvpr.index.measure import Step
from pairvpr.index.merge import Found, merge_top_k
from pairvpr.index.reader import OpenIndex, groups_of_shards, removed_ids
from pairvpr.index.search import Effort, rescore, search

ONE_SHARD_BYTES = 1 << 40
"""Size limit of a task's own temporary cache: unlimited."""
SHARDS_AT_ONCE = 64
"""Shards whose answers are gathered before merging; bounds the driver's memory."""


class Runner(Protocol):
    """Executes work on shards."""

    def run(self, label: str, work: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Run `work(*one)` for each of `arguments`, in order; `label` is for progress lines, empty for small work."""
        ...

    def say(self, line: str) -> None:
        """Print a line for the user."""
        ...


class LocalRunner:
    """Runs work sequentially in this process."""

    def run(self, label: str, work: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """See `Runner`."""
        return [work(*one) for one in arguments]

    def say(self, line: str) -> None:
        """Silent: a library prints nothing."""


def next_generation(
    directory: str, draft: IndexManifest, config: BuildConfig, budget_bytes: float, runner: Runner
) -> IndexManifest:
    """Build the next generation of an index: `draft` with a kind, from described shards. The caller commits it.

    With `auto`, kinds are tried until one reaches the target recall. Raises `IncompleteRunError` if none does.
    """
    num_rows = draft.num_live
    kinds = choose.kinds_to_try(num_rows, draft.descriptor_dim, budget_bytes, config)
    tried = []
    for kind in kinds:
        num_lists = config.num_lists or choose.default_num_lists(num_rows)
        spec = IndexSpec(kind, num_lists if choose.KINDS[kind].has_lists else 0)
        manifest, step = _built(directory, draft, spec, config, runner)
        if step is None or step.reaches(config.target_recall) or config.kind is not IndexKind.auto:
            if step is not None and not step.reaches(config.target_recall):
                runner.say(f"index: {_reached(manifest, step)}, below index.target_recall={config.target_recall}")
            return manifest
        tried.append(_reached(manifest, step))
        runner.say(f"index: {tried[-1]}, not sure to be index.target_recall={config.target_recall}")
    raise IncompleteRunError(
        f"{directory}: no kind of index that fits into {budget_bytes / choose.GIB:.2f} GiB reaches "
        f"index.target_recall={config.target_recall}: {'; '.join(tried)}; the descriptors are kept. Expected a larger "
        "index.memory_budget_gib, a lower index.target_recall, or index.kind=..."
    )


def is_wanted(manifest: IndexManifest, config: BuildConfig) -> bool:
    """Whether an index is what is asked for; `auto` is content with any kind that fits and was measured to reach the
    recall. A kind that is asked for by name stays, however little it was measured to reach: nothing better is known.
    """
    num_lists = build.spec_of(manifest.kind, manifest.factory).num_lists
    size_bytes = choose.index_bytes(IndexKind(manifest.kind), manifest.num_live, manifest.descriptor_dim, num_lists)
    return (
        config.kind in (IndexKind.auto, manifest.kind)
        and (not num_lists or config.num_lists in (None, num_lists))
        and (manifest.measured is None or _is_content(manifest.measured, config))
        and (config.memory_budget_gib is None or size_bytes <= config.memory_budget_gib * choose.GIB)
    )


def _is_content(measured: dict[str, Any], config: BuildConfig) -> bool:
    if config.kind is not IndexKind.auto:
        return measured["target_recall"] >= config.target_recall
    return measure.reached(measured, config.target_recall)


def _reached(manifest: IndexManifest, step: Step) -> str:
    return f"{manifest.kind} has recall {step.recall:.3f} +- {step.standard_error:.3f} of the exact nearest"


def described_shards(directory: str, prefix: str, num_shards: int, first_id: int, num_images: int) -> list[ShardEntry]:
    """Entries of the described shards below `prefix` (`""`, or the path of an update) of an index directory.

    Raises `UserError` if they do not cover exactly the `num_images` ids from `first_id` on.
    """
    entries = []
    for shard in range(num_shards):
        about = descriptor_shards.read_shard_description(
            storage.join(directory, prefix) if prefix else directory, shard
        )
        assert about is not None, f"shard {shard} of {directory}/{prefix} is not described"
        entries.append(
            ShardEntry(
                path=prefix + descriptor_shards.shard_path(shard),
                first_id=about.first_id,
                count=about.count,
                num_rows=about.num_rows,
                num_removed=0,
                files={name: replace(file, path=prefix + file.path) for name, file in about.files.items()},
            )
        )
    num_covered, first_covered = sum(entry.count for entry in entries), entries[0].first_id
    firsts = list(accumulate((entry.count for entry in entries), initial=first_id))[:-1]
    in_order = [entry.first_id for entry in entries] == firsts
    if (num_covered, first_covered) != (num_images, first_id) or not in_order:
        where = storage.join(directory, prefix.rstrip("/") or "shards")
        raise UserError(
            f"{where}: its shards hold {num_covered:,} photos from id {first_covered:,}; expected {num_images:,} "
            f"from id {first_id:,}; delete it and run the same command again"
        )
    return entries


def first_generation(
    directory: str, images: Manifest, num_shards: int, model: dict[str, str], descriptor_dim: int
) -> IndexManifest:
    """The draft of a new index: everything but its kind."""
    shards = described_shards(directory, "", num_shards, 0, len(images))
    return IndexManifest(
        generation=1,
        model=model,
        descriptor_dim=descriptor_dim,
        kind="",
        factory="",
        num_images=len(images),
        num_rejected=sum(entry.count - entry.num_rows for entry in shards),
        num_removed=0,
        images_root=images.root,
        images=[image_table(directory, "images.parquet", images, 0)],
        removed=[],
        shards=shards,
    )


def image_table(directory: str, path: str, images: Manifest, first_id: int) -> ImageTable:
    """Publish a table of photos, replacing any file; the digest in its entry is of the bytes in memory."""
    data = images.parquet_bytes(first_id)
    storage.write_bytes(storage.join(directory, path), data)
    file = StoredFile(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    return ImageTable(file=file, first_id=first_id, count=len(images))


def _built(
    directory: str, draft: IndexManifest, spec: IndexSpec, config: BuildConfig, runner: Runner
) -> tuple[IndexManifest, Step | None]:
    """The draft with faiss files of this kind and, if it is approximate, the measured effort."""
    trained, threads = None, config.num_build_threads
    if choose.KINDS[spec.kind].needs_training:
        runner.run("", _check_rows, [(directory, entry.files["descriptors.npy"]) for entry in draft.shards])
        runner.say(f"index: {spec.factory}: training on a sample")
        (trained,) = runner.run("", _train, [(directory, draft, spec, threads)])
    shards = build_shards(directory, draft.shards, spec, trained, threads, runner)
    manifest = replace(draft, kind=spec.kind.value, factory=spec.factory, trained=trained, shards=shards)
    if choose.KINDS[spec.kind].is_exact:
        return replace(manifest, effort={}, measured=None), None
    steps, num_queries, k = _measured(directory, manifest, config.target_recall, threads, runner)
    chosen = measure.cheapest(steps, config.target_recall, draft.num_live, spec.num_lists)
    measured = measure.as_measured(chosen, steps, config.target_recall, num_queries, k)
    measured["num_photos"] = manifest.num_live
    return replace(manifest, effort=asdict(chosen.effort), measured=measured), chosen


def build_shards(
    directory: str,
    entries: Sequence[ShardEntry],
    spec: IndexSpec,
    trained: StoredFile | None,
    num_threads: int,
    runner: Runner,
) -> list[ShardEntry]:
    """The entries, each with a faiss file of this kind; finished files are kept."""
    arguments = [(directory, entry, spec, trained, num_threads) for entry in entries]
    files = runner.run(f"index {spec.factory}", _build_shard, arguments)
    arrays = [{name: entry.files[name] for name in descriptor_shards.ARRAYS} for entry in entries]
    return [
        replace(entry, files=its | {spec.index_file(trained): file})
        for entry, its, file in zip(entries, arrays, files, strict=True)
    ]


@contextmanager
def own_cache() -> Iterator[LocalCache]:
    """Local copies of a task's inputs, deleted with the task."""
    with tempfile.TemporaryDirectory(prefix="pairvpr-") as folder:
        yield LocalCache(Path(folder), ONE_SHARD_BYTES)


def finished_file(directory: str, path: str) -> StoredFile | None:
    """What a marker says of the file beside it, which is written before it; None without one.

    A marker that is damaged or belongs to another file counts as missing: the file is built again.
    """
    url, remedy = storage.join(directory, f"{path}.json"), "the file beside it is made anew"
    try:
        content = sealed.read_json(url, remedy)
        file = None if content is None else sealed.parsed(StoredFile, content, url, remedy)
        if file is not None and file.path != path:
            raise sealed.DamagedFileError(url, f"it belongs to {file.path}", remedy)
        return file
    except sealed.DamagedFileError as error:
        sealed.warn(error)
        return None


def _check_rows(directory: str, rows: StoredFile) -> None:
    """Read and check a shard's descriptors once: an index must not be trained on damaged ones."""
    with own_cache() as cache, cache.open(storage.join(directory, rows.path), rows.sha256, rows.bytes):
        pass


def _train(directory: str, draft: IndexManifest, spec: IndexSpec, num_threads: int) -> StoredFile:
    files = [entry.files["descriptors.npy"] for entry in draft.shards]
    name = spec.trained_file(files, num_threads)
    file = finished_file(directory, name)
    if file is None:
        urls, counts = _rows_of(directory, draft)
        sample = build.read_training_sample(spec, urls, counts, draft.descriptor_dim)
        file = build.write_faiss(directory, name, build.train(spec, sample, num_threads))
        sealed.write_json(storage.join(directory, f"{name}.json"), asdict(file))
    return file


def _rows_of(directory: str, manifest: IndexManifest) -> tuple[list[str], list[int]]:
    """Descriptor files and their numbers of rows."""
    files = [entry.files["descriptors.npy"] for entry in manifest.shards]
    return [storage.join(directory, file.path) for file in files], [entry.num_rows for entry in manifest.shards]


def _build_shard(
    directory: str, entry: ShardEntry, spec: IndexSpec, trained: StoredFile | None, num_threads: int
) -> StoredFile:
    path = f"{entry.path}/{spec.index_file(trained)}"
    file = finished_file(directory, path)
    if file is None:
        rows = entry.files["descriptors.npy"]
        with own_cache() as cache:
            empty = None if trained is None else build.read_trained(directory, trained, cache)
            with cache.open(storage.join(directory, rows.path), rows.sha256, rows.bytes) as rows_file:
                file = build.build_shard(directory, path, spec, rows_file, empty, num_threads)
        sealed.write_json(storage.join(directory, f"{path}.json"), asdict(file))
    return file


def _measured(
    directory: str, manifest: IndexManifest, target: float, num_threads: int, runner: Runner
) -> tuple[list[Step], int, int]:
    """Recall of the exact nearest neighbours at growing efforts; with the number of queries, and of neighbours.

    Stops one step after the first that reaches the target: beyond that, no effort is cheaper.
    """
    urls, counts = _rows_of(directory, manifest)
    runs = build.held_out_runs(sum(counts))
    queries = build.read_sample(urls, counts, runs)
    own_ids = _ids_of_rows(directory, manifest, np.array([row for run in runs for row in run]))
    is_live = ~np.isin(own_ids, removed_ids(directory, manifest))
    queries, own_ids = queries[is_live], own_ids[is_live]
    k = min(measure.K, manifest.num_live - 1)
    runner.say(
        f"index: {manifest.factory}: measuring recall of the exact {k} nearest with {len(queries)} held-out rows"
    )
    ask = _Asking(directory, manifest, num_threads, runner)
    exact = measure.without_self(ask.merged(_exact_nearest, ask.shards, k + 1, queries, k + 1), own_ids)
    steps = list[Step]()
    is_reached = False
    for num_probes in measure.probe_steps(build.spec_of(manifest.kind, manifest.factory).num_lists):
        was_reached = is_reached
        for effort, found in ask.answers(queries, num_probes, k + 1):
            mean, error = measure.recall(measure.without_self(found, own_ids), exact)
            steps.append(Step(effort, mean, error))
            is_reached |= steps[-1].reaches(target)
        if was_reached:
            break
    return steps, len(queries), k


@dataclass(frozen=True)
class _Asking:
    """Searches all shards of an uncommitted index, a few at a time."""

    directory: str
    manifest: IndexManifest
    num_threads: int
    runner: Runner

    @property
    def shards(self) -> range:
        """Numbers of all pieces."""
        return range(len(self.manifest.shards))

    def merged(self, work: Callable[..., Found], pieces: Sequence[Any], length: int, *more: Any) -> Found:
        """The best results of all pieces (shards, or groups of shards)."""
        best: list[Found] = []
        for answers in self._on(pieces, work, *more):
            best = [merge_top_k([*best, *answers], length)]
        return best[0]

    def answers(self, queries: NDArray[np.float32], num_probes: int, k: int) -> Iterator[tuple[Effort, Found]]:
        """The k nearest when visiting this many lists, for each short-list length."""
        groups = groups_of_shards(self.manifest)
        if not choose.KINDS[IndexKind(self.manifest.kind)].is_rescored:
            yield Effort(num_probes), self.merged(_short_lists, groups, k, queries, num_probes, k)
            return
        length = max(measure.RESCORED_STEPS) + 1
        _, ids = self.merged(_short_lists, groups, length, queries, num_probes, length)
        distances = np.full(ids.shape, np.inf, np.float32)
        for answers in self._on(self.shards, _rescored, queries, ids):
            distances = np.minimum.reduce([distances, *answers])
        for num_rescored in measure.RESCORED_STEPS:
            some = slice(num_rescored + 1)
            yield Effort(num_probes, num_rescored), merge_top_k([(distances[:, some], ids[:, some])], k)

    def _on(self, pieces: Sequence[Any], work: Callable[..., Any], *more: Any) -> Iterator[list[Any]]:
        for first in range(0, len(pieces), SHARDS_AT_ONCE):
            arguments = [
                (self.directory, self.manifest, self.num_threads, piece, *more)
                for piece in pieces[first : first + SHARDS_AT_ONCE]
            ]
            yield self.runner.run("", work, arguments)


def _ids_of_rows(directory: str, manifest: IndexManifest, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Image ids of rows, numbered across all shards."""
    stop, found = 0, []
    for entry in manifest.shards:
        start, stop = stop, stop + entry.num_rows
        inside = rows[(rows >= start) & (rows < stop)] - start
        if len(inside):
            found.append(descriptor_shards.read_checked_array(directory, entry.files["ids.npy"], np.int64, 1)[inside])
    return np.concatenate(found)


def _exact_nearest(
    directory: str, manifest: IndexManifest, num_threads: int, number: int, queries: NDArray[np.float32], k: int
) -> Found:
    with own_cache() as cache:
        opened = OpenIndex(directory, manifest, cache)
        rows, ids, is_live = opened.descriptors(number), opened.ids(number), ~opened.is_removed(number)
        return measure.exact_nearest(rows, ids, is_live, queries, k, num_threads)


def _short_lists(
    directory: str,
    manifest: IndexManifest,
    num_threads: int,
    group: range,
    queries: NDArray[np.float32],
    num_probes: int,
    length: int,
) -> Found:
    """Results only from the requested lists; a real search fills up its answer, so it finds at least as much."""
    with own_cache() as cache:
        shard = OpenIndex(directory, manifest, cache).joined(group)
        effort = Effort(num_probes)
        return search(shard, queries, length, num_threads=num_threads, effort=effort, at_least=1)


def _rescored(
    directory: str,
    manifest: IndexManifest,
    num_threads: int,
    number: int,
    queries: NDArray[np.float32],
    short_lists: NDArray[np.int64],
) -> NDArray[np.float32]:
    with own_cache() as cache:
        opened = OpenIndex(directory, manifest, cache)
        descriptors, ids = opened.descriptors(number), opened.ids(number)
        return rescore(descriptors, ids, queries, short_lists, num_threads=num_threads)
