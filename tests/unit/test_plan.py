"""What an index takes is known before it is built, agrees with hand-made sums, and what cannot fit is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from pairvpr.config.compose import load
from pairvpr.config.schema import BuildConfig, IndexKind, ModelConfig, PlanConfig
from pairvpr.distributed.capacity import disk_bytes, node_rooms, room
from pairvpr.errors import UserError
from pairvpr.index import choose
from pairvpr.index.plan import (
    PROCESS_BYTES,
    WORKING_BYTES,
    NodeRoom,
    Plan,
    Room,
    check_fits,
    plan_index,
    size_text,
    table,
)
from pairvpr.index.plan_dense import DenseRun, DenseWay, dense_table, plan_dense
from ray_jobs import plan as job

GIB, TIB, MIB = 2**30, 2**40, 2**20
SFXL = 2_805_840
CITIES = 100_000_000
VITB = ModelConfig()
PLENTY = Room(nodes=[NodeRoom(memory_bytes=64 * GIB, num_cpus=16)], disk_bytes=TIB)


def plan(num_images: int, budget_gib: float = 16.0, images_per_s: float | None = None, **index: Any) -> Plan:
    return plan_index(num_images, VITB, BuildConfig(**index), budget_bytes=budget_gib * GIB, images_per_s=images_per_s)


def sizes(made: Plan) -> dict[IndexKind, int]:
    return {each.kind: each.bytes for each in made.kinds}


def problems(made: Plan, *, memory_gib: float = 64.0, num_cpus: int = 16, disk_gib: float | None = 1024.0) -> list[str]:
    nodes = [NodeRoom(memory_bytes=int(memory_gib * GIB), num_cpus=num_cpus)]
    found = made.problems(Room(nodes=nodes, disk_bytes=None if disk_gib is None else int(disk_gib * GIB)))
    assert all("\n" not in line for line in found)
    assert all(line.endswith("or index.allow_overcommit=true") for line in found)
    return found


def test_sfxl_as_the_page_on_it_says() -> None:
    made = plan(SFXL, images_per_s=1000)
    assert (made.num_shards, made.images_per_shard) == (12, 233_820)
    assert made.descriptors_bytes == SFXL * 512 * 4
    assert round(made.descriptors_bytes / GIB, 2) == 5.35
    dense = made.dense_features
    assert dense.fp32_bytes_per_image == 23 * 23 * 768 * 4
    assert round(dense.fp32_bytes_per_image / MIB, 2) == 1.55
    assert round(dense.fp32_bytes / TIB, 1) == 4.1
    assert (2 * dense.half_bytes, 2 * dense.half_bytes_per_image) == (dense.fp32_bytes, dense.fp32_bytes_per_image)
    assert made.kind is IndexKind.flat
    assert round(2 * made.descriptors_bytes / GIB, 1) == 10.7
    assert made.storage.index_bytes == 2 * made.descriptors_bytes + SFXL * (8 + 100)
    assert made.storage.peak_bytes == 2 * made.descriptors_bytes + SFXL * (8 + 8 + 100)
    assert made.hours == pytest.approx(0.7794)


def test_sizes_of_every_kind_by_hand() -> None:
    made = plan(SFXL)
    centres = 4096 * 512 * 4
    assert {each.kind: each.factory for each in made.kinds} == {
        IndexKind.flat: "Flat",
        IndexKind.flat_fp16: "SQfp16",
        IndexKind.flat_8bit: "SQ8",
        IndexKind.ivf_fp16: "IVF4096,SQfp16",
        IndexKind.ivf_8bit: "IVF4096,SQ8",
        IndexKind.ivf_rabitq: "IVF4096,RaBitQ",
    }
    assert sizes(made) == {
        IndexKind.flat: SFXL * (512 * 4 + 8),
        IndexKind.flat_fp16: SFXL * (512 * 2 + 8),
        IndexKind.flat_8bit: SFXL * (512 + 8),
        IndexKind.ivf_fp16: SFXL * (512 * 2 + 16) + centres,
        IndexKind.ivf_8bit: SFXL * (512 + 16) + centres,
        IndexKind.ivf_rabitq: SFXL * (512 // 8 + 8 + 16) + centres,
    }


def test_a_hundred_million_photos() -> None:
    made = plan(CITIES, budget_gib=32)
    assert (made.num_shards, made.images_per_shard) == (400, 250_000)
    assert round(made.descriptors_bytes / GIB, 1) == 190.7
    assert made.kind is IndexKind.ivf_rabitq
    centres = 16_384 * 512 * 4
    assert sizes(made)[IndexKind.ivf_rabitq] == CITIES * 88 + centres
    assert [each.kind for each in made.kinds if each.fits] == [IndexKind.ivf_rabitq]
    assert made.storage.index_bytes == made.descriptors_bytes + CITIES * (8 + 100 + 80) + centres
    assert made.storage.peak_bytes == 2 * made.descriptors_bytes + CITIES * (8 + 8 + 100)
    assert made.memory.driver_bytes == PROCESS_BYTES + 100 * CITIES
    opened = CITIES * (88 + 100) + centres
    assert (made.memory.serve_bytes, made.memory.swap_bytes) == (PROCESS_BYTES + opened, PROCESS_BYTES + 2 * opened)


def test_memory_of_each_process_by_hand() -> None:
    made = plan(CITIES, kind=IndexKind.ivf_8bit, num_lists=1024)
    shard = 250_000 * (512 + 16) + 1024 * 512 * 4
    assert made.memory.gather_bytes == PROCESS_BYTES + 5 * 250_000 * 512 * 4 // 2
    assert made.memory.learn_bytes == PROCESS_BYTES + 2 * 65_536 * 512 * 4
    assert made.memory.fill_bytes == PROCESS_BYTES + WORKING_BYTES + 5 * shard // 4
    assert (made.num_groups, made.memory.search_bytes) == (400, PROCESS_BYTES + shard)
    most = plan(CITIES, kind=IndexKind.ivf_8bit).memory.learn_bytes
    assert most == PROCESS_BYTES + 2 * choose.MOST_TRAINING_BYTES
    assert plan(CITIES, kind=IndexKind.flat).memory.learn_bytes == 0


def test_memory_of_shards_that_are_searched_as_one_by_hand() -> None:
    """Twice a group's, and the centres: three shards of a pair are in memory while the second one is copied."""
    of_a_row = 512 // 8 + 8 + 16
    made = plan(CITIES, kind=IndexKind.ivf_rabitq)
    assert made.num_groups == 23  # of 256 rows a list; 400 shards in groups of 17 and 18
    assert made.memory.search_bytes == PROCESS_BYTES + 16_384 * 512 * 4 + 2 * 18 * 250_000 * of_a_row
    pairs = plan(CITIES, kind=IndexKind.ivf_rabitq, num_lists=1024)
    assert pairs.num_groups == 381
    assert pairs.memory.search_bytes == PROCESS_BYTES + 1024 * 512 * 4 + 2 * 2 * 250_000 * of_a_row
    alone = plan(CITIES, kind=IndexKind.ivf_rabitq, num_lists=512)
    assert alone.num_groups == 400
    assert alone.memory.search_bytes == PROCESS_BYTES + 512 * 512 * 4 + 250_000 * of_a_row


def test_a_group_for_each_cpu_must_fit_at_once() -> None:
    made = plan(CITIES, kind=IndexKind.ivf_rabitq, budget_gib=32)
    (line,) = problems(made, memory_gib=16, num_cpus=24)
    assert line.startswith(
        "searching a group of shards takes 987.31 MiB of memory, 23 at once 22.18 GiB, and a node has 16.00 GiB"
    )
    assert "expected another index.kind, larger nodes" in line


def test_the_files_of_kinds_that_auto_may_try_in_vain_are_part_of_the_peak() -> None:
    made = plan(SFXL, budget_gib=3)
    assert made.kind is IndexKind.ivf_fp16
    size, ids = sizes(made), 8 * SFXL
    files = {kind: size[kind] - ids for kind in (IndexKind.ivf_fp16, IndexKind.ivf_8bit, IndexKind.ivf_rabitq)}
    base = made.descriptors_bytes + SFXL * (8 + 100)
    assert made.storage.index_bytes == base + files[IndexKind.ivf_fp16]
    assert made.storage.peak_bytes == max(base + sum(files.values()), base + made.descriptors_bytes + ids)
    narrow = plan_index(
        SFXL, replace(VITB, descriptor_dim=8), BuildConfig(num_lists=64), budget_bytes=SFXL * 33, images_per_s=None
    )
    assert narrow.storage.peak_bytes > narrow.storage.index_bytes + narrow.descriptors_bytes


def test_shards_are_those_asked_for() -> None:
    made = plan(1_000_001, num_shards=3)
    assert (made.num_shards, made.images_per_shard) == (3, 333_334)
    assert [choose.default_num_shards(n) for n in (1, 250_000, 250_001, SFXL)] == [1, 1, 2, 12]


numbers = st.integers(1, 10**10)
widths = st.integers(1, 4096)
kinds = st.sampled_from([kind for kind in IndexKind if kind is not IndexKind.auto])


def totals(made: Plan) -> list[int]:
    dense, storage = made.dense_features, made.storage
    return [
        *(each.bytes for each in made.kinds),
        made.descriptors_bytes,
        made.num_shards,
        *(dense.fp32_bytes, dense.half_bytes),
        *(storage.index_bytes, storage.peak_bytes),
        *(made.memory.driver_bytes, made.memory.learn_bytes),
    ]


enough_for_lists = st.integers(choose.FEWEST_LISTS, 10**10)


@given(few=enough_for_lists, more=enough_for_lists, width=widths, kind=kinds)
def test_no_size_falls_with_more_photos(few: int, more: int, width: int, kind: IndexKind) -> None:
    few, more = sorted((few, more))
    model, config = replace(VITB, descriptor_dim=width), BuildConfig(kind=kind)
    small, large = (plan_index(n, model, config, budget_bytes=GIB, images_per_s=10.0) for n in (few, more))
    assert all(less <= greater for less, greater in zip(totals(small), totals(large), strict=True))
    assert small.hours is not None
    assert large.hours is not None
    assert small.hours <= large.hours
    assert all(each.storage.index_bytes <= each.storage.peak_bytes for each in (small, large))


@given(num_images=numbers, width=widths, low=st.floats(1, 1e15), high=st.floats(1, 1e15))
def test_what_fits_a_budget_fits_a_larger_one(num_images: int, width: int, low: float, high: float) -> None:
    low, high = sorted((low, high))
    model = replace(VITB, descriptor_dim=width)
    tight, wide = (plan_index(num_images, model, BuildConfig(), budget_bytes=budget) for budget in (low, high))
    assert {each.kind for each in tight.kinds if each.fits} <= {each.kind for each in wide.kinds if each.fits}
    assert tight.budget_problem is not None or wide.budget_problem is None
    if tight.budget_problem is None:
        assert sizes(tight)[tight.kind] <= low
        assert choose.PREFERRED.index(wide.kind) <= choose.PREFERRED.index(tight.kind)


@given(num_images=numbers, width=widths, num_shards=st.integers(1, 1000), more=st.integers(0, 1000))
def test_more_shards_never_take_more_memory(num_images: int, width: int, num_shards: int, more: int) -> None:
    model = replace(VITB, descriptor_dim=width)
    few, many = (
        plan_index(num_images, model, BuildConfig(num_shards=number), budget_bytes=1e18).memory
        for number in (num_shards, num_shards + more)
    )
    assert many.gather_bytes <= few.gather_bytes
    assert many.fill_bytes <= few.fill_bytes
    assert many.search_bytes <= few.search_bytes


def test_sfxl_on_enough_machines_has_no_problem() -> None:
    made = plan(SFXL)
    assert problems(made) == []
    assert problems(made, disk_gib=None) == []
    assert made.problems(Room()) == []
    check_fits(made, PLENTY, BuildConfig())


def test_a_budget_that_is_too_small_for_the_kind_is_refused_with_the_numbers() -> None:
    config = BuildConfig(kind=IndexKind.flat, memory_budget_gib=4)
    made = plan_index(SFXL, VITB, config, budget_bytes=4 * GIB)
    (line,) = problems(made)
    assert line.startswith("index.kind=flat: 2,805,840 x 512 descriptors take 5.37 GiB")
    assert "more than 4.00 GiB (index.memory_budget_gib)" in line
    with pytest.raises(UserError) as caught:
        check_fits(made, PLENTY, config)
    assert str(caught.value) == line
    check_fits(made, PLENTY, replace(config, allow_overcommit=True))


def test_a_budget_that_is_too_small_for_all_kinds_is_refused_and_the_smallest_is_planned() -> None:
    (line,) = problems(plan(CITIES, budget_gib=1))
    assert line.startswith("index.kind=auto: no kind of index for 100,000,000 x 512 descriptors fits into 1.00 GiB")
    assert plan(CITIES, budget_gib=1).kind is IndexKind.ivf_rabitq
    assert plan(CITIES, budget_gib=1, allow_overcommit=True).problems(PLENTY) == [line]  # said, and not refused


def test_shards_too_large_for_a_node_are_refused_with_the_numbers() -> None:
    made = plan(SFXL, num_shards=1)
    assert problems(made, memory_gib=8, num_cpus=1) == [
        "gathering a shard of 2,805,840 photos takes 13.57 GiB of memory, and a node has 8.00 GiB; expected more "
        "shards than index.num_shards=1, larger nodes, or index.allow_overcommit=true"
    ]
    gathering, filling, searching = problems(made, memory_gib=4)
    assert gathering.startswith("gathering a shard of 2,805,840 photos takes 13.57 GiB")
    assert filling.startswith("filling a shard of 2,805,840 photos takes 7.04 GiB")
    assert searching.startswith("searching a shard of 2,805,840 photos takes 5.57 GiB")
    assert problems(plan(SFXL, num_shards=12), memory_gib=4, num_cpus=2) == []


def test_as_many_shards_as_a_node_has_cpus_must_fit_at_once() -> None:
    (line,) = problems(plan(SFXL), memory_gib=8, num_cpus=64)
    assert line == (
        "filling a shard of 233,820 photos takes 901.08 MiB of memory, 12 at once 10.56 GiB, and a node has 8.00 GiB; "
        "expected more shards than index.num_shards=12, larger nodes, or index.allow_overcommit=true"
    )
    assert problems(plan(SFXL), memory_gib=8, num_cpus=8) == []


def test_a_sample_too_large_for_a_node_is_refused() -> None:
    (line,) = problems(plan(CITIES, kind=IndexKind.ivf_rabitq, num_shards=4000), memory_gib=1.2, num_cpus=1)
    assert line.startswith("learning from a sample takes 1.45 GiB of memory, and a node has 1.20 GiB; expected another")


def test_the_smallest_of_several_nodes_counts() -> None:
    nodes = [NodeRoom(memory_bytes=64 * GIB, num_cpus=8), NodeRoom(memory_bytes=GIB, num_cpus=1)]
    (line,) = plan(SFXL).problems(Room(nodes=nodes))
    assert "takes 1.31 GiB of memory, and a node has 1.00 GiB" in line


def test_a_disk_too_small_is_refused_with_the_numbers() -> None:
    assert problems(plan(SFXL), disk_gib=10) == [
        "the index of 2,805,840 photos takes 10.99 GiB of disk, and up to 11.01 GiB while it is made; there are "
        "10.00 GiB for it; expected another disk, or index.allow_overcommit=true"
    ]
    assert len(problems(plan(SFXL, budget_gib=1, num_shards=1), disk_gib=1, memory_gib=1)) == 3


def test_room_is_what_a_disk_has_free_and_what_the_index_holds_already(tmp_path: Path) -> None:
    directory = tmp_path / "not" / "yet" / "there"
    before = disk_bytes(str(directory))
    assert before is not None
    assert disk_bytes("s3://bucket/index") is None
    (directory / "shards").mkdir(parents=True)
    (directory / "shards" / "rows").write_bytes(bytes(50 * MIB))
    after = disk_bytes(f"file://{directory}")
    assert after is not None
    assert abs(after - before) < 40 * MIB  # others write to this disk, too


def test_room_of_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 8.0, "memory": 3.0 * GIB, "object_store_memory": 1.0 * GIB}},
        {"Alive": True, "Resources": {"CPU": 0.5, "memory": 2.0 * GIB}},
        {"Alive": True, "Resources": {"memory": 9.0 * GIB}},  # a head without CPUs: nothing runs there
        {"Alive": True, "Resources": {"CPU": 4.0}},  # it does not say
        {"Alive": False, "Resources": {"CPU": 4.0, "memory": 1.0}},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    found = [NodeRoom(memory_bytes=4 * GIB, num_cpus=8), NodeRoom(memory_bytes=2 * GIB, num_cpus=1)]
    assert node_rooms() == found
    assert room() == room("s3://bucket/index") == Room(nodes=found)


def test_the_json_has_every_number_of_the_table() -> None:
    made = plan(SFXL, budget_gib=3, images_per_s=500)
    content = json.loads(json.dumps(made.as_json()))
    assert content["kind"] == "ivf_fp16"
    assert content["index_kind"] == "auto"
    assert content["kinds"][3] == {
        "kind": "ivf_fp16",
        "factory": "IVF4096,SQfp16",
        "num_lists": 4096,
        "bytes": SFXL * 1040 + 4096 * 2048,
        "fits": True,
    }
    text = table(made, "given")
    for words in (
        "2,805,840 photos in 12 shards of at most 233,820, model vitb with 512 values a descriptor",
        "to be built: ivf_fp16, which index.kind=auto tries first",
        "5.35 GiB",
        "4.15 TiB, 1.55 MiB a photo",
        size_text(content["storage"]["peak_bytes"]),
        size_text(content["memory"]["learn_bytes"]),
        "1.56 hours at 500.0 photos/s (given)",
    ):
        assert words in text
    assert "hours" not in table(plan(SFXL), "")
    assert "learn" not in table(plan(SFXL), "")


def test_sizes_for_people() -> None:
    texts = [size_text(size) for size in (0, 1536, 5 * MIB, 5.351715 * GIB, 1024 * GIB)]
    assert texts == ["0.00 KiB", "1.50 KiB", "5.00 MiB", "5.35 GiB", "1.00 TiB"]


def test_planning_needs_no_faiss_torch_or_ray() -> None:
    code = "import sys, pairvpr.index.plan_dense; print({'faiss', 'torch', 'ray'} & sys.modules.keys())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_lists_that_so_few_photos_can_not_fill_are_a_mistake() -> None:
    with pytest.raises(UserError, match=r"^index.kind=ivf_8bit: 5 photos are too few for 16 lists"):
        plan(5, kind=IndexKind.ivf_8bit)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "benchmark=... and plan.num_images=...: neither is given; expected one of them"),
        (["plan.num_images=5", "benchmark=toy_city"], "benchmark=... and plan.num_images=...: both are given"),
        (["plan.num_images=0"], "plan.num_images=0: expected a number above 0"),
        (["plan.num_images=5", "plan.images_per_s=0"], "plan.images_per_s=0.0: expected a number above 0"),
        (["plan.num_images=5", "plan.calibration_photos=-1"], "plan.calibration_photos=-1: expected a number above 0"),
        (["plan.num_images=5", "output=''"], "output is empty: expected a value"),
        (["plan.num_image=5"], "unknown key plan.num_image: did you mean plan.num_images?"),
        (["benchmark=toycity"], "benchmark=toycity: unknown; did you mean toy_city?"),
        (["benchmark=sfxl_v1"], "missing: datasets_root=..."),
        (["plan.num_images=5", "index.kind=flat", "index.num_lists=3"], "index.kind=flat has no lists"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        load(PlanConfig, arguments)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_the_command_line_says_reaches_the_plan() -> None:
    config = load(PlanConfig, ["plan.num_images=5", "model=vitb", "index.kind=ivf_8bit", "output=/o/plan.json/"])
    assert (config.plan.num_images, config.benchmark, config.model.name) == (5, None, "vitb")
    assert (config.index.kind, config.output) == (IndexKind.ivf_8bit, "/o/plan.json")
    config = load(PlanConfig, ["benchmark=toy_city", "benchmark.num_places=7"])
    assert config.plan.num_images is None
    assert config.benchmark is not None


def test_an_output_that_can_not_be_written_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output, words in ((tmp_path, "a directory; expected a file"), (tmp_path / "file" / "plan.json", "file")):
        with pytest.raises(UserError, match=words) as caught:
            job.plan(load(PlanConfig, ["plan.num_images=5", f"output={output}"]))
        assert "\n" not in str(caught.value)
        assert not ray.is_initialized()


def test_without_anything_to_measure_no_ray_is_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["benchmark=toy_city", "plan.images_per_s=10", "index.memory_budget_gib=1", f"output={tmp_path}/p.json"]
    content = job.plan(load(PlanConfig, line))
    assert not ray.is_initialized()
    assert (content["num_images"], content["hours"], content["kind"]) == (180, 0.005, "flat")
    assert (content["calibration"], content["nodes"], content["problems"]) == (None, [], [])
    assert json.loads((tmp_path / "p.json").read_text()) == content
    assert json.loads(capsys.readouterr().out.split("\n\n")[-1]) == content
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]


def test_what_there_is_no_room_for_is_said_below_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["plan.num_images=100000000", "model=vitb", "plan.images_per_s=10", "index.memory_budget_gib=1"]
    content = job.plan(load(PlanConfig, line))
    assert len(content["problems"]) == 1
    assert f"no room: {content['problems'][0]}\n" in capsys.readouterr().out


def test_other_machines_must_see_the_photos_of_a_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    class Context:
        def get_node_id(self) -> str:
            return "a"

    nodes = [{"Alive": True, "Resources": {"CPU": 2.0}, "NodeID": name} for name in "ab"]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "get_runtime_context", Context)
    with pytest.raises(UserError, match=r"^the cluster has several machines, .*, or plan.images_per_s=\.\.\.$"):
        job._check_shared(None)
    job._check_shared("s3://bucket/plan.json")
    del nodes[1]
    job._check_shared(None)


def dense(num_images: int, num_queries: int, num_candidates: int = 100, images_per_s: float | None = None) -> DenseRun:
    return plan_dense(num_images, num_queries, num_candidates, VITB, images_per_s)


def test_dense_features_of_a_run_by_hand() -> None:
    """MSLS val with K = 100: 74,000 candidates at most, of 18,871 photos."""
    made = dense(18_871, 740, images_per_s=100)
    assert {cost.way: (cost.described_at_most, cost.stored_bytes_at_most) for cost in made.ways} == {
        DenseWay.recompute: (74_000, 0),
        DenseWay.cache: (74_000, 0),
        DenseWay.store: (18_871, 18_871 * 529 * 768 * 2),
        DenseWay.store_whole_database: (18_871, 18_871 * 529 * 768 * 2),
    }
    assert [cost.hours_at_most for cost in made.ways] == pytest.approx([74_000 / 360_000] * 2 + [18_871 / 360_000] * 2)
    assert made.cheapest is DenseWay.store
    assert dense(SFXL, 2140).cheapest is DenseWay.cache  # as far as can be told, no photo is asked for twice
    text = dense_table(made)
    assert "store                             18,871        0.05   14.28 GiB" in text
    assert "cheapest if no two queries share a candidate: store." in text
    assert "?" in dense_table(dense(18_871, 740))


@given(images=st.integers(1, 10**9), queries=st.integers(1, 10**6), candidates=st.integers(1, 2000))
def test_no_way_is_below_what_a_run_can_take(images: int, queries: int, candidates: int) -> None:
    """Against a run that is drawn: its candidates are never more than is planned for."""
    made = dense(images, queries, candidates)
    described = {cost.way: cost.described_at_most for cost in made.ways}
    of_each = min(images, candidates)
    some = min(queries, 50)
    drawn = [set(range(first, first + of_each)) for first in range(0, some * of_each, of_each)]
    union = {image % images for ids in drawn for image in ids} if some * of_each < 20_000 else set()
    assert len(union) <= described[DenseWay.store] <= described[DenseWay.recompute]
    assert described[DenseWay.store] <= described[DenseWay.store_whole_database] == images
    assert described[made.cheapest] == min(described.values())


def test_queries_are_those_of_the_benchmark_or_given(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["plan.images_per_s=10", "index.memory_budget_gib=1", "model=vitb"]
    assert job.plan(load(PlanConfig, ["plan.num_images=500", *line]))["dense_run"] is None
    assert "rerank.dense_features" not in capsys.readouterr().out
    content = job.plan(load(PlanConfig, ["benchmark=toy_city", *line]))["dense_run"]
    assert (content["num_queries"], content["num_candidates"]) == (60, 100)
    assert "dense features of 60 queries with 100 candidates each, at most:" in capsys.readouterr().out
    line += ["plan.num_queries=7", "plan.num_candidates=3"]
    content = job.plan(load(PlanConfig, ["plan.num_images=500", *line]))["dense_run"]
    assert content["ways"][0]["described_at_most"] == 21
