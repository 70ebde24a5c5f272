"""Photos -> descriptor shards with Ray Data. The flow is drawn in `docs/data_flow.md`.

    batches still to do -> decode (CPU tasks) -> network (actor pool) -> part files -> driver commits shards

A batch is cut from the manifest by position. Its part file has a name and a content that depend on settings and
ids alone (the seconds it took aside), so a part that exists is right, whoever wrote it and when.
"""

from __future__ import annotations

import io
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray
import ray.data
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy, DataContext, ExecutionResources
from ray.exceptions import RayError
from ray.util.annotations import RayDeprecationWarning

from pairvpr.config.schema import DescribeConfig
from pairvpr.data import storage
from pairvpr.data.manifest import Manifest
from pairvpr.distributed.progress import Progress, say
from pairvpr.distributed.runtime import CPUS_OF_A_SMALL_TASK, ActorPlan, ModelSource, plan_actors
from pairvpr.errors import IncompleteRunError, UserError
from pairvpr.index import store
from pairvpr.retrieval.describe import PhotoBatch, load_batch, num_batches

Rows = Any
"""A batch of Ray Data: a dict from column names to arrays."""
BYTES_PER_TASK = 32 << 20
MAX_BATCHES_PER_TASK = 8
MAX_TRIES = 3
PARTS_READ_AT_ONCE = 16


@dataclass(frozen=True)
class Description:
    """What is described where: the photos of `manifest` into `num_shards` shards below `directory`."""

    manifest: Manifest
    directory: str
    num_shards: int
    source: ModelSource
    config: DescribeConfig

    @property
    def batches(self) -> int:
        """Number of batches of the manifest."""
        return num_batches(len(self.manifest), self.config.batch_size)

    def batches_of(self, shard: store.ShardRange) -> range:
        """The batches that hold the shard's photos; a batch on a border belongs to both its shards."""
        if shard.count == 0:
            return range(0)
        size = self.config.batch_size
        return range(shard.first_id // size, (shard.stop_id - 1) // size + 1)

    def part_url(self, batch: int) -> str:
        """Where a batch's descriptors wait until their shards are committed."""
        return storage.join(self.directory, "parts", part_name(batch))


def part_name(batch: int) -> str:
    """File name of a batch's part."""
    return f"{batch:08d}.npz"


def describe(description: Description, label: str, *, needs_a_readable_photo: bool) -> None:
    """Describe every photo; finished shards and batches are skipped, and a finished description wholly.

    Raises `IncompleteRunError` where Ray gives up on a batch, and `UserError` where no photo at all can be read but one
    is needed.
    """
    manifest, parts = description.manifest, storage.join(description.directory, "parts")
    if store.read_description(description.directory) is not None:
        say(f"describe {label}: finished earlier, skipped")
        storage.remove_tree(parts)
        return
    manifest.write(storage.join(description.directory, "images.parquet"))
    shards = store.shard_ranges(len(manifest), description.num_shards)
    commits = _Commits(description, shards)
    existing = set(storage.list_files(parts))
    pending = []
    for batch in sorted(commits.shards_of):
        if part_name(batch) in existing:
            commits.batch_is_done(batch)
        else:
            pending.append(batch)

    photos_left = sum(len(_ids_of(description, batch)) for batch in pending)
    progress = Progress(f"describe {label}", len(manifest), "photos", already_done=len(manifest) - photos_left)
    try:
        for batch in _finished_batches(description, pending):
            commits.batch_is_done(batch)
            progress.add(len(_ids_of(description, batch)))
        ray.get(commits.refs)
    except Exception as error:
        raise _as_error_for_people(error, f"describe {label}", progress) from error
    described = [store.read_shard_description(description.directory, shard.shard) for shard in shards]
    finished = [about for about in described if about is not None]
    assert len(finished) == len(shards), "a shard was never completed"
    if needs_a_readable_photo and sum(about.num_rows for about in finished) == 0:
        raise UserError(
            f"{manifest.root}: none of the {len(manifest)} photos can be read, the first because of "
            f"{finished[0].rejected.get(0)}; delete {description.directory} to try again"
        )
    store.finish_description(description.directory, manifest, finished)
    storage.remove_tree(parts)
    progress.finish()


def _as_error_for_people(error: BaseException, step: str, progress: Progress) -> Exception:
    """The `UserError` that an actor raised, if that is behind it; else what is lost and what is kept, in a line."""
    cause: BaseException | None = error
    while cause is not None:
        inner = getattr(cause, "cause", None)
        for found in (cause, inner):
            if isinstance(found, UserError):
                return UserError(str(found))
        cause = cause.__cause__
    if not isinstance(error, RayError):
        assert isinstance(error, Exception)
        return error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return IncompleteRunError(
        f"{step}: {progress.total - progress.done:,} of {progress.total:,} photos are not described, because Ray gave "
        f"up on a batch: {type(error).__name__}: {lines[-1] if lines else ''}. What is finished is kept: the same line "
        "again does the rest"
    )


def _ids_of(description: Description, batch: int) -> range:
    size = description.config.batch_size
    return range(batch * size, min((batch + 1) * size, len(description.manifest)))


class _Commits:
    """Starts to commit a shard as soon as the last of its batches is done.

    `shards_of` holds, for each batch that is needed, the unfinished shards it belongs to.
    """

    def __init__(self, description: Description, shards: Sequence[store.ShardRange]) -> None:
        self.description = description
        self.refs: list[ray.ObjectRef[None]] = []
        self.shards_of: dict[int, list[store.ShardRange]] = {}
        self._batches_left: dict[int, int] = {}
        for shard in shards:
            if store.read_shard_description(description.directory, shard.shard) is not None:
                continue
            batches = description.batches_of(shard)
            self._batches_left[shard.shard] = len(batches)
            for batch in batches:
                self.shards_of.setdefault(batch, []).append(shard)
            if not batches:
                self._commit(shard)

    def batch_is_done(self, batch: int) -> None:
        """Its part is on storage."""
        for shard in self.shards_of[batch]:
            self._batches_left[shard.shard] -= 1
            if not self._batches_left[shard.shard]:
                self._commit(shard)

    def _commit(self, shard: store.ShardRange) -> None:
        description = self.description
        commit = _commit_shard.options(num_cpus=CPUS_OF_A_SMALL_TASK)
        urls = [description.part_url(batch) for batch in description.batches_of(shard)]
        self.refs.append(commit.remote(description.directory, shard, urls, description.source.config.descriptor_dim))


@ray.remote(max_retries=MAX_TRIES, retry_exceptions=True)
def _commit_shard(directory: str, shard: store.ShardRange, part_urls: Sequence[str], descriptor_dim: int) -> None:
    """Gather a shard's rows from its parts, in the order of ids, and publish it."""
    ids, rows = [np.empty(0, np.int64)], [np.empty((0, descriptor_dim), np.float32)]
    rejected: dict[int, str] = {}
    seconds = 0.0
    with ThreadPoolExecutor(PARTS_READ_AT_ONCE) as pool:
        read = pool.map(storage.read_bytes, part_urls)
    for data in read:
        with np.load(io.BytesIO(data), allow_pickle=False) as part:
            inside = (part["ids"] >= shard.first_id) & (part["ids"] < shard.stop_id)
            ids.append(part["ids"][inside])
            rows.append(part["descriptors"][inside])
            for image_id, error in zip(part["rejected_ids"].tolist(), part["rejected_errors"].tolist(), strict=True):
                if shard.first_id <= image_id < shard.stop_id:
                    rejected[image_id] = error
            if shard.first_id <= int(part["first_id"]) < shard.stop_id:
                seconds += float(part["seconds"])
    all_ids = np.concatenate(ids)
    accounted = np.sort(np.concatenate([all_ids, np.fromiter(rejected, np.int64, len(rejected))]))
    assert np.array_equal(accounted, np.arange(shard.first_id, shard.stop_id)), "a photo is missing or double"
    about = store.ShardDescription(shard.first_id, shard.count, len(all_ids), rejected, seconds)
    store.write_shard_description(directory, shard.shard, all_ids, np.concatenate(rows), about)


def _finished_batches(description: Description, pending: Sequence[int]) -> Iterator[int]:
    """Run the batches through Ray Data; yields each when its part is on storage."""
    if not pending:
        return
    plan = plan_actors(description.config)
    size_px = description.source.config.image_size_px
    batch_bytes = description.config.batch_size * size_px * size_px * 3
    fair_share = len(pending) // (4 * plan.num_actors)
    batches_per_task = max(1, min(MAX_BATCHES_PER_TASK, BYTES_PER_TASK // batch_bytes, fair_share))
    tasks = [pending[first : first + batches_per_task] for first in range(0, len(pending), batches_per_task)]

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=description.config.memory_gib * 2**30
    )
    with warnings.catch_warnings():
        # The retry limits have no other spelling in this Ray, which warns that they will get one.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        parts = _parts(description, tasks, plan)
    for rows in parts.iter_batches(batch_size=None, prefetch_batches=0):
        yield from (int(batch) for batch in rows["batch"])


def _parts(description: Description, tasks: Sequence[Sequence[int]], plan: ActorPlan) -> ray.data.Dataset:
    """The data set of finished batches; nothing runs before it is read."""
    config, source = description.config, description.source
    decode = partial(
        _decode,
        tasks=tasks,
        manifest=ray.put(description.manifest),
        batch_size=config.batch_size,
        size_px=source.config.image_size_px,
    )
    return (
        # `range` would be an operator of its own that wants a whole CPU; on a node with one the job would hang.
        ray.data.from_items([{"id": task} for task in range(len(tasks))], override_num_blocks=len(tasks))
        .map_batches(decode, batch_size=None, num_cpus=plan.cpus_per_task, max_retries=MAX_TRIES)
        .map_batches(
            _Network,
            batch_size=1,  # a row is a batch of photos
            compute=ActorPoolStrategy(size=min(plan.num_actors, len(tasks))),
            fn_constructor_kwargs={"source": source, "num_threads": config.num_threads_per_actor},
            num_cpus=plan.cpus_per_actor,
            num_gpus=plan.gpus_per_actor or None,
            max_restarts=-1,  # spot nodes vanish again and again; a batch that kills its actor ends by the next line
            max_task_retries=MAX_TRIES,
        )
        .map_batches(
            partial(_write_parts, directory=description.directory),
            batch_size=None,
            num_cpus=CPUS_OF_A_SMALL_TASK,
            max_retries=MAX_TRIES,
        )
    )


def _decode(
    rows: Rows,
    *,
    tasks: Sequence[Sequence[int]],
    manifest: ray.ObjectRef[Manifest],
    batch_size: int,
    size_px: int,
) -> Rows:
    """Task numbers -> a row for each of their batches: pixels as bytes, errors as JSON."""
    photos = ray.get(manifest)
    decoded: dict[str, list[Any]] = {"batch": [], "first_id": [], "pixels": [], "errors": [], "seconds": []}
    for batch in (batch for task in rows["id"] for batch in tasks[task]):
        started_s = time.perf_counter()
        loaded = load_batch(photos, batch, batch_size, size_px)
        decoded["batch"].append(batch)
        decoded["first_id"].append(loaded.first_id)
        decoded["pixels"].append(loaded.pixels.tobytes())
        decoded["errors"].append(json.dumps(loaded.errors))
        decoded["seconds"].append(time.perf_counter() - started_s)
    return decoded


class _Network:
    """One model actor: pixels -> the bytes of part files."""

    def __init__(self, source: ModelSource, num_threads: int) -> None:
        self.describer = source.describer(num_threads)
        self.size_px = source.config.image_size_px

    def __call__(self, rows: Rows) -> Rows:
        parts = []
        columns = (rows[name] for name in ("first_id", "pixels", "errors", "seconds"))
        for first_id, pixels, errors, seconds in zip(*columns, strict=True):
            started_s = time.perf_counter()
            shape = (-1, self.size_px, self.size_px, 3)
            photos = np.frombuffer(pixels, np.uint8).reshape(shape).copy()
            loaded = PhotoBatch(
                int(first_id), photos, {int(position): text for position, text in json.loads(errors).items()}
            )
            descriptors = self.describer.descriptors(photos)
            parts.append(_part_bytes(loaded, descriptors, seconds + time.perf_counter() - started_s))
        return {"batch": rows["batch"], "part": parts}


def _part_bytes(batch: PhotoBatch, descriptors: NDArray[np.float32], seconds: float) -> bytes:
    ids, rows = batch.kept(descriptors)
    sink = io.BytesIO()
    np.savez(
        sink,
        allow_pickle=False,
        first_id=np.int64(batch.first_id),
        ids=ids,
        descriptors=rows,
        rejected_ids=np.array(list(batch.rejected), np.int64),
        rejected_errors=np.array(list(batch.rejected.values()), np.str_),
        seconds=np.float64(seconds),
    )
    return sink.getvalue()


def _write_parts(rows: Rows, *, directory: str) -> Rows:
    for batch, part in zip(rows["batch"], rows["part"], strict=True):
        storage.write_bytes(storage.join(directory, "parts", part_name(batch)), bytes(part))
    return {"batch": rows["batch"]}
