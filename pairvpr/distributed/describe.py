"""Photos -> descriptor shards with Ray Data. The flow is drawn in `docs/data_flow.md`.

parts still to do -> decode (CPU tasks) -> network and part files (actor pool) -> driver commits shards
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, ExecutionResources
from ray.exceptions import RayActorError

from pairvpr.config.schema import DescribeConfig
from pairvpr.data import stamps, storage
from pairvpr.data.descriptor_file import DescriptorFile
from pairvpr.data.manifest import Manifest
from pairvpr.data.photo_batches import PhotoBatch
from pairvpr.distributed import parts as part_files
from pairvpr.distributed.index import RayRunner
from pairvpr.distributed.metrics import bytes_of, count_failure, counted
from pairvpr.distributed.network import ModelSource, NetworkSource, UserNetworkSource
from pairvpr.distributed.parts import Parts, Rows
from pairvpr.distributed.progress import Progress
from pairvpr.distributed.runtime import ActorPlan, cpus_of_a_shard, most_gpus_of_a_node, plan_actors, share_cpus
from pairvpr.errors import IncompleteRunError, UserError
from pairvpr.index import descriptor_shards
from pairvpr.machine import in_a_line
from pairvpr.quiet import ignore_warnings
from pairvpr.retrieval.first_stage import FirstStage
from pairvpr.terminal import say

MAX_TRIES = 3
MAX_RESTARTS = 20
"""Per model actor. Generous, because spot nodes vanish often; finite, because an actor may never start."""
SECONDS_BEFORE_COMPLAINT = 10.0
CALLS_PER_ACTOR = 2
"""Parts per actor at once: one is in the network while another is received or written."""


def source_of(first: FirstStage, own: ModelSource | None) -> NetworkSource | DescriptorFile:
    """Where the rows of a first stage come from; `own` is Pair-VPR's network, where the job has it."""
    found = first.file or (first.user_network and UserNetworkSource(first.user_network)) or own
    assert found is not None, "the network's own rows need the network"
    return found


@dataclass(frozen=True)
class Description:
    """A description job: the photos of `manifest` into `num_shards` shards below `directory`.

    `first_id` is the image id of the first photo.
    """

    manifest: Manifest
    directory: str
    num_shards: int
    source: NetworkSource | DescriptorFile
    config: DescribeConfig
    first_id: int = 0

    @property
    def network(self) -> NetworkSource:
        """The source, where it is no file."""
        assert not isinstance(self.source, DescriptorFile)
        return self.source

    @property
    def parts(self) -> Parts:
        """How the photos are cut."""
        directory = storage.join(self.directory, "parts")
        return Parts.of(directory, len(self.manifest), self.config.batch_size, self.network.photos.image_size_px)


def describe(
    description: Description,
    label: str,
    *,
    needs_a_readable_photo: bool,
    on_finished: Callable[[int], object] = lambda _: None,
) -> None:
    """Describe every photo, skipping finished shards and parts (or everything, if it is finished).

    Rows of a file take the place of those of a network, shard by shard; all else is the same.

    `on_finished` is called with the number of photos on storage, whenever it grows.

    Raises `IncompleteRunError` if Ray gives up on a part. Raises `UserError` if a task raised one, if no photo can be
    read but one is needed, and if photos have changed since the description was finished.
    """
    manifest, parts_directory = description.manifest, storage.join(description.directory, "parts")
    about = descriptor_shards.read_description(description.directory)
    if about is not None:
        if (about.num_images, about.num_shards) != (len(manifest), description.num_shards):
            raise UserError(
                f"{description.directory}: it describes {about.num_images:,} photos in {about.num_shards} shards; "
                f"expected {len(manifest):,} in {description.num_shards}; delete it and run the same command again"
            )
        stamps.check_unchanged(manifest, description.directory)
        say(f"describe {label}: finished earlier, skipped")
        storage.remove_tree(parts_directory)
        return
    manifest.write(storage.join(description.directory, "images.parquet"), description.first_id)
    shards = descriptor_shards.shard_ranges(len(manifest), description.num_shards)
    if isinstance(description.source, DescriptorFile):
        _copy_rows(description, description.source, shards, label)
    else:
        _describe_photos(description, shards, label, on_finished)
    described = [descriptor_shards.read_shard_description(description.directory, shard.shard) for shard in shards]
    finished = [about for about in described if about is not None]
    assert len(finished) == len(shards), "a shard was never completed"
    if needs_a_readable_photo and sum(about.num_rows for about in finished) == 0:
        rejected = {image_id: error for about in finished for image_id, error in about.rejected.items()}
        raise UserError(
            f"{manifest.root}: none of the {len(manifest)} photos can be read, the first because of "
            f"{rejected[min(rejected)]}; delete {description.directory} to try again"
        )
    descriptor_shards.finish_description(description.directory, manifest, finished, description.first_id)
    for line in descriptor_shards.about_photos(description.directory):
        say(f"describe {label}: {line}")
    storage.remove_tree(parts_directory)


def _copy_rows(
    description: Description, file: DescriptorFile, shards: Sequence[descriptor_shards.ShardRange], label: str
) -> None:
    """The rows of a file as shards that are not there yet, a task each; photos without a row are rejected."""
    manifest, directory = description.manifest, description.directory
    if stamps.read(directory) is None:
        stamps.write(directory, stamps.stamps(manifest))
    rows = file.rows_of(manifest)
    arguments = [
        (directory, shard, file.url, file.width, rows[shard.first_id : shard.stop_id], description.first_id)
        for shard in shards
        if descriptor_shards.read_shard_description(directory, shard.shard) is None
    ]
    RayRunner().run(f"describe {label}", part_files.copy_shard, arguments)
    without = sum(int((rows_of_shard < 0).sum()) for _, _, _, _, rows_of_shard, _ in arguments)
    count_failure(f"describe {label}", "photo", without)


def _describe_photos(
    description: Description,
    shards: Sequence[descriptor_shards.ShardRange],
    label: str,
    on_finished: Callable[[int], object],
) -> None:
    """The photos of shards that are not there yet, through the network."""
    manifest, parts = description.manifest, description.parts
    _forget_changed(description, label)
    commits = _Commits(description, shards, f"describe {label}")
    existing = set(storage.list_files(parts.directory))
    pending = []
    for part in sorted(commits.shards_of):
        if parts.name(part) in existing:
            commits.part_is_done(part)
        else:
            pending.append(part)

    photos_left = sum(len(parts.ids(part)) for part in pending)
    already_done = len(manifest) - photos_left
    with Progress(f"describe {label}", len(manifest), "photos", already_done=already_done) as progress:
        try:
            for part in _finished_parts(description, pending, progress.step):
                commits.part_is_done(part)
                progress.add(len(parts.ids(part)))
                on_finished(progress.done)
            ray.get(commits.refs)
        except Exception as error:
            raise _as_error_for_people(error, f"describe {label}", progress) from error


def _forget_changed(description: Description, label: str) -> None:
    """Record the photos' versions before describing them; photos that have changed since are described again."""
    photos, parts, directory = description.manifest, description.parts, description.directory
    now, before = stamps.stamps(photos), stamps.read(directory)
    if before is not None:
        changed = stamps.changed(before, now)
        for shard in descriptor_shards.shard_ranges(len(photos), description.num_shards):
            if ((changed >= shard.first_id) & (changed < shard.stop_id)).any():
                descriptor_shards.remove_shard_description(directory, shard.shard)
        for part in np.unique(changed // parts.photos_per_part).tolist():
            storage.remove_file(parts.url(part))
        if not len(changed):
            return
        first = photos.path(int(changed[0]))
        say(f"describe {label}: {len(changed):,} photos have changed since ({first} first); they are described again")
    stamps.write(directory, now)


def _as_error_for_people(error: BaseException, step: str, progress: Progress) -> Exception:
    """The user's error that a task raised, if that is the cause; otherwise one line on what is missing and kept."""
    cause: BaseException | None = error
    while cause is not None:
        # Ray's copy of a task's error is an instance of both classes, and its message is a traceback.
        for found in (getattr(cause, "cause", None), cause):
            if isinstance(found, UserError | IncompleteRunError):
                return type(found)(storage.reason(found))  # Ray Data appends lines about its own settings
        cause = cause.__cause__
    inner = getattr(error, "cause", None) or error
    why = in_a_line(inner)
    if isinstance(error, RayActorError):
        limits = f"at most {MAX_RESTARTS} restarts, {MAX_TRIES + 1} tries of a part"
        last = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "")
        why = f"a model actor that died again and again ({limits}): {type(error).__name__}: {last}"
    return IncompleteRunError(
        f"{step}: {progress.total - progress.done:,} of {progress.total:,} photos were not described: {why}. "
        "Finished work is kept: run the same command again to do the rest"
    )


class _Commits:
    """Starts to commit a shard as soon as its last part is done.

    `shards_of` maps each needed part to the unfinished shards that it belongs to.
    """

    def __init__(self, description: Description, shards: Sequence[descriptor_shards.ShardRange], step: str) -> None:
        self.description = description
        self._commit_shard: Any = ray.remote(counted(part_files.commit_shard, step))
        self.refs: list[ray.ObjectRef[None]] = []
        self.shards_of: dict[int, list[descriptor_shards.ShardRange]] = {}
        self._parts_left: dict[int, int] = {}
        for shard in shards:
            if descriptor_shards.read_shard_description(description.directory, shard.shard) is not None:
                continue
            parts = description.parts.of_shard(shard)
            self._parts_left[shard.shard] = len(parts)
            for part in parts:
                self.shards_of.setdefault(part, []).append(shard)
            if not parts:
                self._commit(shard)

    def part_is_done(self, part: int) -> None:
        """It is on storage."""
        for shard in self.shards_of[part]:
            self._parts_left[shard.shard] -= 1
            if not self._parts_left[shard.shard]:
                self._commit(shard)

    def _commit(self, shard: descriptor_shards.ShardRange) -> None:
        description, parts = self.description, self.description.parts
        options = {"num_cpus": cpus_of_a_shard(), "max_retries": MAX_TRIES, "retry_exceptions": [OSError]}
        commit = self._commit_shard.options(**options)
        urls = [parts.url(part) for part in parts.of_shard(shard)]
        width = description.network.width
        self.refs.append(commit.remote(description.directory, shard, urls, width, description.first_id))


def _finished_parts(description: Description, pending: Sequence[int], step: str) -> Iterator[int]:
    """Run the parts through Ray Data; yields each one once it is on storage."""
    if not pending:
        return
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # otherwise a task's `UserError` arrives as text in a traceback
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        cpu=share_cpus(), object_store_memory=description.config.memory_gib * 2**30
    )
    plan = plan_actors(description.config)
    # This Ray has no other way to set the retry limits, though it warns that one is coming.
    ignore_warnings(module=r"pairvpr\.", message="`ray_remote_args` is deprecated")
    finished = _described(description, pending, plan, step)
    complaint = threading.Timer(SECONDS_BEFORE_COMPLAINT, _complain, (plan,))
    complaint.daemon = True
    complaint.start()
    try:
        for rows in finished.iter_batches(batch_size=None, prefetch_batches=0):
            complaint.cancel()
            yield from (int(part) for part in rows["part"])
    finally:
        complaint.cancel()


def _complain(plan: ActorPlan) -> None:
    """Say what actors wait for: Ray waits silently, and the cluster may still grow."""
    resources = ray.cluster_resources()
    say(
        f"describe: no photo is described yet; each of {plan.num_actors} actors needs {plan.cpus_per_actor:g} CPUs and "
        f"{plan.gpus_per_actor:g} GPUs on one node; the cluster has {resources.get('CPU', 0.0):g} CPUs and "
        f"{resources.get('GPU', 0.0):g} GPUs, at most {most_gpus_of_a_node():g} GPUs on one node"
    )


def _described(description: Description, pending: Sequence[int], plan: ActorPlan, step: str) -> ray.data.Dataset:
    """The lazy dataset of finished parts."""
    config, source, parts = description.config, description.network, description.parts
    decode = partial(
        part_files.decode,
        manifest=ray.put(description.manifest),
        photos_per_part=parts.photos_per_part,
        settings=source.photos,
        step=step,
    )
    return (
        # `range` would be an operator that reserves a whole CPU; on a node with one CPU the job would hang.
        ray.data.from_items([{"part": part} for part in pending], override_num_blocks=len(pending))
        .map_batches(decode, batch_size=None, num_cpus=plan.cpus_per_task, max_retries=MAX_TRIES)
        .map_batches(
            _Network,
            batch_size=1,  # a row is a part
            compute=ActorPoolStrategy(
                size=min(plan.num_actors, len(pending)),
                max_concurrent_calls_per_actor=CALLS_PER_ACTOR,
                enable_true_multi_threading=True,
            ),
            fn_constructor_kwargs={
                "source": source,
                "parts": parts,
                "batch_size": config.batch_size,
                "num_threads": config.num_threads_per_actor,
                "step": step,
            },
            num_cpus=plan.cpus_per_actor,
            num_gpus=plan.gpus_per_actor or None,
            max_restarts=MAX_RESTARTS,
            max_task_retries=MAX_TRIES,  # so a part that kills its actor ends before that
        )
    )


def _by_position(texts: str) -> dict[int, str]:
    """Texts by position, as sent by `parts.decode`."""
    return {int(position): text for position, text in json.loads(texts).items()}


class _Network:
    """One model actor: pixels -> part files. Several threads call it; one at a time uses the network."""

    def __init__(self, source: NetworkSource, parts: Parts, batch_size: int, num_threads: int, step: str) -> None:
        self.describer = source.describer(num_threads)
        self.size_px = source.photos.image_size_px
        self.parts = parts
        self.batch_size = batch_size
        self.step = step
        self.in_the_network = threading.Lock()

    def __call__(self, rows: Rows) -> Rows:
        columns = (rows[name] for name in ("part", "pixels", "errors", "remarks", "seconds"))
        with bytes_of(self.step):
            for part in zip(*columns, strict=True):
                self._describe(*part)
        return {"part": rows["part"]}

    def _describe(self, part: int, pixels: bytes, errors: str, remarks: str, seconds: float) -> None:
        """Describe and write a part, whose photos took `seconds` so far."""
        photos = PhotoBatch(
            self.parts.ids(part).start,
            np.frombuffer(pixels, np.uint8).reshape(-1, self.size_px, self.size_px, 3).copy(),
            _by_position(errors),
            _by_position(remarks),
        )
        with self.in_the_network:
            started_s = time.perf_counter()
            descriptors = np.concatenate(
                [
                    self.describer.descriptors(photos.pixels[first : first + self.batch_size])
                    for first in range(0, len(photos.pixels), self.batch_size)
                ]
            )
            seconds += time.perf_counter() - started_s
        part_files.write(self.parts.url(part), photos, descriptors, seconds)
