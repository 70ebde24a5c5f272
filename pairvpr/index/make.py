"""A finished index of described shards: faiss files shard by shard, the effort that is needed, the next generation.

The work on shards is done by a `Runner`: here, one after another, or by tasks on a cluster. Q queries, k results.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pairvpr.config.schema import BuildConfig, IndexKind
from pairvpr.data import storage
from pairvpr.data.local_cache import LocalCache
from pairvpr.data.manifest import Manifest
from pairvpr.errors import IncompleteRunError
from pairvpr.index import build, choose, measure, store
from pairvpr.index.build import IndexSpec
from pairvpr.index.manifest import ImageTable, IndexManifest, ShardEntry, StoredFile, stored_file
from pairvpr.index.measure import Step
from pairvpr.index.merge import Found, merge_top_k
from pairvpr.index.reader import OpenIndex
from pairvpr.index.search import Effort, rescore, search

ONE_SHARD_BYTES = 1 << 40
"""Of a cache that goes with its task: nothing in it is ever too much."""


class Runner(Protocol):
    """Where the work on shards is done."""

    def run(self, label: str, work: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """`work(*one)` for each of `arguments`, in their order; `label` is for people, empty for small work."""
        ...

    def say(self, line: str) -> None:
        """Tell people."""
        ...


class InThisProcess:
    """One after another."""

    def run(self, label: str, work: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """As `Runner` says."""
        return [work(*one) for one in arguments]

    def say(self, line: str) -> None:
        """Nobody listens."""


def make_index(
    directory: str, draft: IndexManifest, config: BuildConfig, budget_bytes: float, runner: Runner
) -> IndexManifest:
    """The next generation of an index, `draft` with a kind, from described shards; it is for the caller to commit.

    Under `auto` kinds are tried until one reaches the wanted recall. Raises `IncompleteRunError` where none does.
    """
    num_rows = sum(entry.num_rows for entry in draft.shards)
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
    """Whether an index is of the kind that is asked for; `auto` is content with any."""
    num_lists = build.spec_of(manifest.kind, manifest.factory).num_lists
    return config.kind in (IndexKind.auto, manifest.kind) and config.num_lists in (None, num_lists)


def _reached(manifest: IndexManifest, step: Step) -> str:
    return f"{manifest.kind} has recall {step.recall:.3f} +- {step.standard_error:.3f} of the exact nearest"


def described_shards(directory: str, prefix: str, num_shards: int) -> list[ShardEntry]:
    """Entries of the described shards below `prefix` (`""`, or the path of an update) of an index directory."""
    entries = []
    for shard in range(num_shards):
        about = store.read_shard_description(storage.join(directory, prefix) if prefix else directory, shard)
        assert about is not None, f"shard {shard} of {directory}/{prefix} is not described"
        entries.append(
            ShardEntry(
                path=prefix + store.shard_path(shard),
                first_id=about.first_id,
                count=about.count,
                num_rows=about.num_rows,
                num_removed=0,
                files={name: replace(file, path=prefix + file.path) for name, file in about.files.items()},
            )
        )
    return entries


def first_generation(
    directory: str, images: Manifest, num_shards: int, model: dict[str, str], descriptor_dim: int
) -> IndexManifest:
    """The draft of a new index: everything but its kind."""
    shards = described_shards(directory, "", num_shards)
    table = stored_file(directory, "images.parquet")
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
        images=[ImageTable(file=table, first_id=0, count=len(images))],
        removed=[],
        shards=shards,
    )


def _built(
    directory: str, draft: IndexManifest, spec: IndexSpec, config: BuildConfig, runner: Runner
) -> tuple[IndexManifest, Step | None]:
    """The draft with faiss files of this kind and, for an approximate one, the effort that was measured to do."""
    trained, threads = None, config.num_build_threads
    if choose.KINDS[spec.kind].needs_training:
        runner.say(f"index: {spec.factory}: learning from a sample")
        urls = [storage.join(directory, entry.files["descriptors.npy"].path) for entry in draft.shards]
        counts = [entry.num_rows for entry in draft.shards]
        (trained,) = runner.run("", _train, [(directory, spec, urls, counts, draft.descriptor_dim, threads)])
    shards = build_shards(directory, draft.shards, spec, trained, threads, runner)
    manifest = replace(draft, kind=spec.kind.value, factory=spec.factory, trained=trained, shards=shards)
    if choose.KINDS[spec.kind].is_exact:
        return replace(manifest, effort={}, measured=None), None
    steps, num_queries, k = _measured(directory, manifest, threads, runner)
    chosen = measure.cheapest(steps, config.target_recall, draft.num_live, spec.num_lists)
    measured = measure.as_measured(chosen, steps, config.target_recall, num_queries, k)
    return replace(manifest, effort=asdict(chosen.effort), measured=measured), chosen


def build_shards(
    directory: str,
    entries: Sequence[ShardEntry],
    spec: IndexSpec,
    trained: StoredFile | None,
    num_threads: int,
    runner: Runner,
) -> list[ShardEntry]:
    """The entries with a faiss file of this kind each; a file that is finished is kept."""
    arguments = [(directory, entry, spec, trained, num_threads) for entry in entries]
    files = runner.run(f"index {spec.factory}", _build_shard, arguments)
    arrays = [{name: entry.files[name] for name in store.ARRAYS} for entry in entries]
    return [
        replace(entry, files=its | {spec.index_file: file})
        for entry, its, file in zip(entries, arrays, files, strict=True)
    ]


@contextmanager
def own_cache() -> Iterator[LocalCache]:
    """Local copies of what a task reads; they go with it."""
    with tempfile.TemporaryDirectory(prefix="pairvpr-") as folder:
        yield LocalCache(Path(folder), ONE_SHARD_BYTES)


def _finished_file(url: str) -> StoredFile | None:
    """What a marker says of the file beside it, which is written before it."""
    try:
        return StoredFile(**storage.read_json(url))
    except FileNotFoundError:
        return None


def _train(
    directory: str, spec: IndexSpec, urls: Sequence[str], counts: Sequence[int], descriptor_dim: int, num_threads: int
) -> StoredFile:
    marker = storage.join(directory, f"{spec.trained_file}.json")
    file = _finished_file(marker)
    if file is None:
        sample = build.read_training_sample(spec, urls, counts, descriptor_dim)
        file = build.write_trained(directory, spec, build.train(spec, sample, num_threads))
        storage.write_json(marker, asdict(file))
    return file


def _build_shard(
    directory: str, entry: ShardEntry, spec: IndexSpec, trained: StoredFile | None, num_threads: int
) -> StoredFile:
    marker = storage.join(directory, entry.path, f"{spec.index_file}.json")
    file = _finished_file(marker)
    if file is None:
        rows = entry.files["descriptors.npy"]
        with own_cache() as cache:
            path = cache.path(storage.join(directory, rows.path), rows.sha256, rows.bytes)
            empty = None if trained is None else build.read_trained(directory, trained, cache)
            file = build.build_shard(directory, entry.path, spec, path, empty, num_threads)
        storage.write_json(marker, asdict(file))
    return file


def _measured(directory: str, manifest: IndexManifest, num_threads: int, runner: Runner) -> tuple[list[Step], int, int]:
    """Recall of the exact nearest at several efforts, of how many queries, and how many nearest."""
    counts = [entry.num_rows for entry in manifest.shards]
    urls = [storage.join(directory, entry.files["descriptors.npy"].path) for entry in manifest.shards]
    runs = build.held_out_runs(sum(counts))
    queries = build.read_sample(urls, counts, runs)
    own_ids = _ids_of_rows(directory, manifest, np.array([row for run in runs for row in run]))
    k = min(measure.K, sum(counts) - 1)
    runner.say(
        f"index: {manifest.factory}: measuring recall of the exact {k} nearest with {len(queries)} held-out rows"
    )

    def on_all_shards(work: Callable[..., Any], *more: Any) -> list[Any]:
        numbers = range(len(manifest.shards))
        return runner.run("", work, [(directory, manifest, num_threads, number, *more) for number in numbers])

    exact = measure.without_self(merge_top_k(on_all_shards(_exact_nearest, queries, k + 1), k + 1), own_ids)
    probes = measure.probe_steps(build.spec_of(manifest.kind, manifest.factory).num_lists)
    is_rescored = choose.KINDS[IndexKind(manifest.kind)].is_rescored
    length = max(measure.RESCORED_STEPS) + 1 if is_rescored else k + 1
    parts = on_all_shards(_short_lists, queries, probes, length)
    lists = [merge_top_k([part[i] for part in parts], length) for i in range(len(probes))]
    steps = []
    for num_probes, found in zip(probes, lists, strict=True):
        if not is_rescored:
            mean, error = measure.recall(measure.without_self(found, own_ids), exact)
            steps.append(Step(Effort(num_probes), mean, error))
            continue
        distances = np.minimum.reduce(on_all_shards(_rescored, queries, found[1]))
        for num_rescored in measure.RESCORED_STEPS:
            best = merge_top_k([(distances[:, : num_rescored + 1], found[1][:, : num_rescored + 1])], k + 1)
            mean, error = measure.recall(measure.without_self(best, own_ids), exact)
            steps.append(Step(Effort(num_probes, num_rescored), mean, error))
    return steps, len(queries), k


def _ids_of_rows(directory: str, manifest: IndexManifest, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Image ids of rows that count through all shards."""
    stop, found = 0, []
    for entry in manifest.shards:
        start, stop = stop, stop + entry.num_rows
        inside = rows[(rows >= start) & (rows < stop)] - start
        if len(inside):
            found.append(store.read_checked_array(directory, entry.files["ids.npy"])[inside])
    return np.concatenate(found)


def _exact_nearest(
    directory: str, manifest: IndexManifest, num_threads: int, number: int, queries: NDArray[np.float32], k: int
) -> Found:
    with own_cache() as cache:
        opened = OpenIndex(directory, manifest, cache)
        return measure.exact_nearest(opened.descriptors(number), opened.ids(number), queries, k, num_threads)


def _short_lists(
    directory: str,
    manifest: IndexManifest,
    num_threads: int,
    number: int,
    queries: NDArray[np.float32],
    probes: Sequence[int],
    length: int,
) -> list[Found]:
    with own_cache() as cache:
        shard = OpenIndex(directory, manifest, cache).shard(number)
        return [search(shard, queries, length, num_threads=num_threads, effort=Effort(n)) for n in probes]


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
