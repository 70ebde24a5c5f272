"""The driver's side of describing, without Ray: what it starts, what it says, and how an error reads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from ray.exceptions import ActorDiedError, RayTaskError

from pairvpr.config.schema import DescribeConfig
from pairvpr.data import stamps, storage
from pairvpr.data.descriptor_file import DescriptorFile
from pairvpr.data.manifest import Manifest
from pairvpr.distributed import describe as steps
from pairvpr.distributed.describe import Description, describe
from pairvpr.distributed.network import ModelSource
from pairvpr.distributed.progress import Progress
from pairvpr.distributed.runtime import ActorPlan
from pairvpr.errors import IncompleteRunError, UserError
from pairvpr.index import descriptor_shards
from pairvpr.retrieval.describe import Describer
from tests.support.small import small_model, small_model_config

PLAN = ActorPlan(num_actors=2, cpus_per_actor=1.0, gpus_per_actor=4.0, cpus_per_task=1.0)


class FakeCommit:
    """Stands for the remote task; remembers what each commit reserves."""

    def __init__(self) -> None:
        self.reserved: list[dict[str, Any]] = []
        self.shards: list[int] = []

    def options(self, **reserved: Any) -> FakeCommit:
        self.reserved.append(reserved)
        return self

    def remote(self, *arguments: Any) -> None:
        """Nothing is started."""
        self.shards.append(arguments[1].shard)


def description_of(directory: Path, num_photos: int, num_shards: int) -> Description:
    manifest = Manifest.of("/photos", [f"{number}.jpg" for number in range(num_photos)])
    source = ModelSource(small_model_config(), cast(Any, None))
    return Description(manifest, str(directory), num_shards, source, DescribeConfig(batch_size=2))


def test_commits_reserve_what_index_builds_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a resumed run, whose parts may all be there, would have every shard in memory at once."""
    commit, counted_steps = FakeCommit(), list[str]()
    monkeypatch.setattr(ray, "remote", lambda _: commit)
    monkeypatch.setattr(steps, "counted", lambda _work, step: counted_steps.append(step))
    monkeypatch.setattr(steps, "cpus_of_a_shard", lambda: 0.75)
    commits = steps._Commits(description_of(tmp_path, 9, 3), descriptor_shards.shard_ranges(9, 3), "describe database")
    for part in sorted(commits.shards_of):
        commits.part_is_done(part)
    assert commit.shards == [0, 1, 2]
    assert [reserved["num_cpus"] for reserved in commit.reserved] == [0.75] * 3
    assert counted_steps == ["describe database"]


def test_the_first_photo_that_can_not_be_read_is_the_one_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where shards are more than photos, and the first ones have none."""
    description = description_of(tmp_path, 2, 4)
    for shard in descriptor_shards.shard_ranges(2, 4):
        rejected = {image_id: f"reason {image_id}" for image_id in range(shard.first_id, shard.stop_id)}
        descriptor_shards.write_shard_description(
            str(tmp_path),
            shard.shard,
            np.empty(0, np.int64),
            np.empty((0, 16), np.float32),
            first_id=shard.first_id,
            count=shard.count,
            rejected=rejected,
            seconds=0.0,
        )
    monkeypatch.setattr(ray, "get", lambda refs: refs)
    with pytest.raises(UserError, match="none of the 2 photos can be read, the first because of reason 0"):
        describe(description, "database", needs_a_readable_photo=True)


def test_a_description_that_does_not_start_says_what_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = threading.Event()

    class Slow:
        def iter_batches(self, **_: object) -> Iterator[dict[str, list[int]]]:
            assert started.wait(20)
            time.sleep(0.2)  # a second complaint would come now
            yield {"part": [0]}

    def resources() -> dict[str, float]:
        started.set()
        return {"CPU": 8.0, "GPU": 2.0}

    monkeypatch.setattr(steps, "SECONDS_BEFORE_COMPLAINT", 0.05)
    monkeypatch.setattr(steps, "plan_actors", lambda _: PLAN)
    monkeypatch.setattr(steps, "_described", lambda *_: Slow())
    monkeypatch.setattr(steps, "most_gpus_of_a_node", lambda: 1.0)
    monkeypatch.setattr(ray, "cluster_resources", resources)
    assert list(steps._finished_parts(description_of(tmp_path, 2, 1), [0], "describe database")) == [0]
    assert capsys.readouterr().err == (
        "describe: no photo is described yet; each of 2 actors needs 1 CPUs and 4 GPUs on one node; "
        "the cluster has 8 CPUs and 2 GPUs, at most 1 GPUs on one node\n"
    )


def from_a_task(error: Exception) -> RayTaskError:
    return RayTaskError("task", "Traceback ...\n  many lines", error).as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (from_a_task(UserError("/photos: wrong\nRay Data's own settings")), UserError, "/photos: wrong"),
        (from_a_task(OSError("disk\nlines")), IncompleteRunError, "OSError: disk. Finished work is kept"),
        (from_a_task(IncompleteRunError("part 3 was damaged")), IncompleteRunError, "part 3 was damaged"),
        (ValueError("inside\nRay Data"), IncompleteRunError, "database: 6 of 10 photos were not described: "),
        (
            ActorDiedError(),
            IncompleteRunError,
            "a model actor that died again and again (at most 20 restart",
        ),
    ],
)
def test_an_error_out_of_ray_data_is_one_line(error: Exception, kind: type[Exception], words: str) -> None:
    found = steps._as_error_for_people(error, "database", Progress("database", 10, "photos", already_done=4))
    assert type(found) is kind
    assert words in str(found)
    assert "\n" not in str(found)


def test_every_thread_that_describes_has_the_threads_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """An actor is built in one thread and called in others."""
    before = torch.get_num_threads()
    model = small_model()
    wanted = before + 1
    seen: list[int] = []
    describe_pixels = model.describe

    def spy(pixels: torch.Tensor) -> Any:
        seen.append(torch.get_num_threads())
        return describe_pixels(pixels)

    monkeypatch.setattr(model, "describe", spy)
    describer = Describer(model, wanted)
    pixels = np.zeros((1, 28, 28, 3), np.uint8)
    try:
        for call in (lambda: describer.descriptors(pixels), lambda: describer.embedded(pixels[0])):
            torch.set_num_threads(before)
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
    finally:
        torch.set_num_threads(before)
    assert seen == [wanted, wanted]


def test_what_was_described_of_changed_photos_is_forgotten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their parts and shards alone; what has not changed is kept, also the finished shard that shares a part."""
    photos, directory = tmp_path / "photos", tmp_path / "index"
    photos.mkdir()
    names = [f"{number}.jpg" for number in range(9)]
    for name in names:
        (photos / name).write_text("as it was")
    manifest = Manifest.of(str(photos), names)
    source = ModelSource(small_model_config(), cast(Any, None))
    description = Description(manifest, str(directory), 3, source, DescribeConfig(batch_size=2))
    steps._forget_changed(description, "database")
    parts = description.parts
    for part in range(len(parts)):
        storage.write_bytes(parts.url(part), b"a part")
    for shard in descriptor_shards.shard_ranges(9, 3)[:2]:
        ids = np.arange(shard.first_id, shard.stop_id)
        descriptor_shards.write_shard_description(
            str(directory), shard.shard, ids, np.ones((3, 16), np.float32),
            first_id=shard.first_id, count=3, rejected={}, seconds=0.0,
        )  # fmt: skip

    def kept() -> tuple[list[str], list[bool]]:
        finished = [descriptor_shards.read_shard_description(str(directory), shard) is not None for shard in range(3)]
        return sorted(storage.list_files(parts.directory)), finished

    steps._forget_changed(description, "database")
    assert kept() == ([parts.name(part) for part in range(5)], [True, True, False])
    (photos / "2.jpg").write_text("another photo")
    (photos / "7.jpg").write_text("another photo")
    steps._forget_changed(description, "database")
    assert kept() == ([parts.name(part) for part in (0, 2, 4)], [False, True, False])
    said = "describe database: 2 photos have changed since (2.jpg first); they are described again"
    assert capsys.readouterr().err.splitlines() == [said]
    pending = steps._Commits(description, descriptor_shards.shard_ranges(9, 3), "describe database").shards_of
    assert sorted(pending) == [0, 1, 3, 4]  # the parts of both shards that are to be committed
    stamps.check_unchanged(manifest, str(directory))

    commit = FakeCommit()
    monkeypatch.setattr(ray, "remote", lambda _: commit)
    monkeypatch.setattr(steps, "cpus_of_a_shard", lambda: 1.0)
    monkeypatch.setattr(steps, "_finished_parts", lambda _description, parts, _step: iter(parts))
    monkeypatch.setattr(ray, "get", lambda refs: refs)
    (photos / "4.jpg").write_text("another photo of the shard that was finished")
    steps._describe_photos(description, descriptor_shards.shard_ranges(9, 3), "database", lambda _: None)
    assert sorted(commit.shards) == [0, 1, 2]


def test_failures_of_earlier_runs_are_not_counted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where photos are unreadable in shards that are there already, and rows missing of shards that are copied."""
    counted: list[tuple[str, str, int]] = []
    monkeypatch.setattr(steps, "count_failure", lambda *what: counted.append(what))
    monkeypatch.setattr(ray, "get", lambda refs: refs)
    for name in ("network", "file"):
        for shard in descriptor_shards.shard_ranges(4, 2):
            if name == "network" or shard.shard == 0:
                descriptor_shards.write_shard_description(
                    str(tmp_path / name), shard.shard, np.array([shard.first_id]), np.ones((1, 16), np.float32),
                    first_id=shard.first_id, count=2, rejected={shard.first_id + 1: "unreadable"}, seconds=0.0,
                )  # fmt: skip
    describe(description_of(tmp_path / "network", 4, 2), "database", needs_a_readable_photo=True)
    assert counted == []

    class Runner:
        def run(self, label: str, _work: object, arguments: list[Any]) -> None:
            assert (label, len(arguments)) == ("describe database", 1)

    monkeypatch.setattr(steps, "RayRunner", Runner)
    file = DescriptorFile("rows.npy", 16, pa.chunked_array([["0.jpg", "3.jpg"]]), "stamp")
    description = replace(description_of(tmp_path / "file", 4, 2), source=file)
    steps._copy_rows(description, file, descriptor_shards.shard_ranges(4, 2), "database")
    assert counted == [("describe database", "photo", 1)]
