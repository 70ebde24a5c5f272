"""Hours and dollars of a plan agree with sums made by hand, and with the settings that they come from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairvpr.config.compose import load
from pairvpr.config.schema import BuildConfig, IndexKind, ModelConfig, PlanConfig
from pairvpr.errors import UserError
from pairvpr.index.plan import plan_index
from pairvpr.index.plan_cost import KINDS, CpuRates, KindCost, Machines, Rates, Store, Work, cost_table, plan_cost
from pairvpr.index.speed import measured_cpu_rates
from ray_jobs import plan as job

CITIES = 100_000_000
GIB = 2**30
MACHINES = Machines(number=8, cpus_each=48, price_per_hour=2.0)
STORE = Store(photo_bytes=100_000, price_per_gib_read=0.09, price_per_gib_month=0.02)
CPU = CpuRates(
    centres=5e7,
    scanned={IndexKind.flat: 6e7, IndexKind.ivf_8bit: 1.5e7, IndexKind.ivf_rabitq: 4e7},
    added={IndexKind.flat: 3e6, IndexKind.ivf_8bit: 1e6, IndexKind.ivf_rabitq: 1e5},
)
RATES = Rates(images_per_s=8000, dense_per_s=4000, pairs_per_s=2000, cpu=CPU)
WORK = Work(10_000, 100, 2)


def cost(
    kind: IndexKind, num_images: int = CITIES, machines: Machines = MACHINES, rates: Rates = RATES, work: Work = WORK
) -> KindCost:
    plan = plan_index(num_images, ModelConfig(), BuildConfig(kind=kind), budget_bytes=1e15)
    return plan_cost(plan, machines, STORE, rates, work)


def test_a_hundred_million_as_flat_by_hand() -> None:
    made = cost(IndexKind.flat)
    assert {step.step: step.hours for step in made.steps} == {
        "describe": pytest.approx(CITIES / 8000 / 3600),
        "fill": pytest.approx(CITIES / 3e6 / 384 / 3600),
        "describe queries": pytest.approx(10_000 / 8000 / 3600),
        "search": pytest.approx(10_000 * CITIES / 6e7 / 384 / 3600),
        "describe candidates": pytest.approx(1_000_000 / 4000 / 3600),
        "score pairs": pytest.approx(1_000_000 / 2000 / 3600),
    }
    assert made.dollars == pytest.approx(made.hours * 8 * 2.0)
    row_bytes, photos = 512 * 4, CITIES + 10_000 + 1_000_000
    # photos; rows as parts and to fill; the index to search it
    assert made.read_bytes == pytest.approx(photos * 100_000 + 2 * CITIES * row_bytes + CITIES * (row_bytes + 8))
    assert made.read_dollars == pytest.approx(made.read_bytes / GIB * 0.09)
    assert made.kept_bytes == CITIES * (2 * row_bytes + 8 + 100)
    assert made.kept_dollars_a_month == pytest.approx(made.kept_bytes / GIB * 0.02)


def test_a_hundred_million_as_one_bit_codes_by_hand() -> None:
    made = cost(IndexKind.ivf_rabitq)
    lists, sample = 16_384, 640 * 2**20 // 2048
    hours = {step.step: step.hours for step in made.steps}
    assert hours["learn"] == pytest.approx(10 * sample * lists / 5e7 / 2 / 3600)
    assert hours["fill"] == pytest.approx(CITIES * (1 / 1e5 + lists / 5e7) / 384 / 3600)
    groups = plan_index(CITIES, ModelConfig(), BuildConfig(kind=made.kind), budget_bytes=1e15).num_groups
    assert groups < 384  # no more CPUs than groups are busy
    assert hours["measure"] == pytest.approx(256 * CITIES * (1 / 6e7 + 1 / 16 / 4e7) / groups / 3600)
    assert hours["search"] == pytest.approx(10_000 * (CITIES / 64 / 4e7 + lists / 5e7) / groups / 3600)


def test_what_is_unknown_is_no_part_of_the_sums_and_said() -> None:
    made = cost(IndexKind.ivf_8bit, rates=replace(RATES, images_per_s=None, dense_per_s=None, pairs_per_s=None))
    unknown = {step.step for step in made.steps if step.hours is None}
    assert unknown == {"describe", "describe queries", "describe candidates", "score pairs"}
    assert made.hours == pytest.approx(sum(step.hours or 0 for step in made.steps))
    text = cost_table([made], MACHINES, STORE)
    assert text.count("?") == 2 * len(unknown) + 1
    assert text.endswith("?: no rate is known, so it is not in the sums; give plan.pairs_per_s=...")
    without = cost_table([cost(IndexKind.flat, rates=replace(RATES, dense_per_s=None))], MACHINES, STORE)
    assert without.endswith("?: no rate is known, so it is not in the sums")
    assert "?" not in cost_table([cost(IndexKind.ivf_8bit)], MACHINES, STORE)


def test_rows_of_a_file_are_read_and_no_photo_is_described_but_for_re_ranking() -> None:
    rates = replace(RATES, images_per_s=None)
    made = cost(IndexKind.flat, rates=rates, work=replace(WORK, rows_from_file=True))
    steps = {step.step: step for step in made.steps}
    assert (steps["describe"].hours, steps["describe queries"].hours) == (0.0, 0.0)
    assert steps["describe candidates"].hours == pytest.approx(1_000_000 / 4000 / 3600)
    assert steps["describe"].read_bytes == CITIES * 512 * 4
    assert steps["describe queries"].read_bytes == 10_000 * 512 * 4
    assert steps["describe candidates"].read_bytes == 1_000_000 * 100_000


@given(
    kind=st.sampled_from(KINDS),
    images=st.integers(100_000, 10**9),
    number=st.integers(1, 500),
    more=st.integers(0, 500),
    cpus=st.integers(1, 256),
    queries=st.none() | st.integers(1, 10**6),
)
def test_more_machines_never_take_longer(
    kind: IndexKind, images: int, number: int, more: int, cpus: int, queries: int | None
) -> None:
    few, many = (
        cost(kind, images, Machines(number=each, cpus_each=cpus, price_per_hour=1.0), work=Work(queries, 100, 2))
        for each in (number, number + more)
    )
    assert many.hours <= few.hours * (1 + 1e-9)
    assert many.read_bytes == few.read_bytes
    assert few.hours <= few.dollars / number * (1 + 1e-9) <= few.hours * (1 + 2e-9)


def test_the_rates_of_a_cpu_are_measured_with_one_thread_which_is_given_back() -> None:
    faiss.omp_set_num_threads(2)
    rates = measured_cpu_rates(16, KINDS)
    assert faiss.omp_get_max_threads() == 2
    assert set(rates.scanned) == set(rates.added) == set(KINDS)
    found = np.array([rates.centres, *rates.scanned.values(), *rates.added.values()])
    assert (found > 1e4).all()
    assert np.isfinite(found).all()


LINE = ("model=vitb", "plan.images_per_s=1000", "index.memory_budget_gib=32")
MACHINES_GIVEN = ("plan.num_machines=8", "plan.cpus_per_machine=48")


def planned(*line: str) -> dict[str, Any]:
    return job.plan(load(PlanConfig, [*LINE, *line]))


def test_costs_come_with_a_price(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "measured_cpu_rates", lambda _width, _kinds: CPU)
    assert planned("plan.num_images=100000000")["costs"] is None
    assert "dollars" not in capsys.readouterr().out
    asked = ("plan.price_per_hour=2", *MACHINES_GIVEN, "plan.pairs_per_s=2000")
    content = planned("plan.num_images=100000000", "plan.num_queries=10000", "index.num_lists=1024", *asked)
    out = capsys.readouterr().out
    assert json.loads(out[out.index("\n{\n") :]) == json.loads(json.dumps(content))
    assert [each["kind"] for each in content["costs"]["kinds"]] == ["flat", "ivf_8bit", "ivf_rabitq"]
    for words in ("8 machines of 48 CPUs at $2.00 an hour each", "27.78      444.44", "kept, a month"):
        assert words in out
    few = planned("plan.num_images=10", "plan.price_per_hour=2", *MACHINES_GIVEN)["costs"]  # too few for lists
    assert [each["kind"] for each in few["kinds"]] == ["flat"]


RERANKED = ("plan.num_images=200000", "plan.num_queries=100", "plan.price_per_hour=2", "plan.pairs_per_s=2000")


def hours(content: dict[str, Any]) -> dict[str, float | None]:
    """Of each step with the exact kind."""
    return {step["step"]: step["hours"] for step in content["costs"]["kinds"][0]["steps"]}


def test_the_speed_of_a_network_of_ones_own_is_not_that_of_the_candidates(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "measured_cpu_rates", lambda _width, _kinds: CPU)
    its = ("descriptor.module=tests.support.user_networks:wide", "descriptor.image_size_px=28")
    content = planned(*RERANKED, *MACHINES_GIVEN, *its)
    assert content["hours"] == pytest.approx(200 / 3600)
    assert hours(content)["describe"] == content["hours"]
    assert hours(content)["describe queries"] == pytest.approx(0.1 / 3600)
    assert hours(content)["describe candidates"] is None
    assert {way["hours_at_most"] for way in content["dense_run"]["ways"]} == {None}
    (remark,) = content["remarks"]
    assert remark.startswith("descriptor.module: the speed is that of your network; how fast Pair-VPR's describes what")
    assert f"\n{remark}\n" in capsys.readouterr().out
    assert planned("plan.num_images=9", *its)["remarks"] == []
    assert planned("plan.num_images=9", "plan.num_queries=2")["remarks"] == []


def test_nothing_is_charged_for_describing_photos_whose_rows_are_in_a_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(job, "measured_cpu_rates", lambda _width, _kinds: CPU)
    np.save(tmp_path / "rows.npy", np.ones((2, 16), np.float32))
    (tmp_path / "rows.txt").write_text("a.jpg\nb.jpg\n")
    of_file = f"describe.descriptors={tmp_path}/rows.npy"
    content = planned(*RERANKED, *MACHINES_GIVEN, of_file)
    assert (content["hours"], content["images_per_s"]) == (None, None)
    assert (hours(content)["describe"], hours(content)["describe queries"]) == (0.0, 0.0)
    assert hours(content)["describe candidates"] == pytest.approx(10 / 3600)
    assert content["costs"]["kinds"][0]["steps"][0]["read_bytes"] == 200_000 * 16 * 4
    out = capsys.readouterr().out
    assert "photos/s" not in out
    assert [line for line in out.splitlines() if line.startswith("describe.descriptors: ")] == content["remarks"]
    assert content["remarks"][1].endswith("which describes what is re-ranked, is plan.images_per_s")

    unknown = planned(*RERANKED, *MACHINES_GIVEN, of_file, "plan.images_per_s=null")
    assert hours(unknown)["describe candidates"] is None
    assert unknown["remarks"][1].endswith("which describes what is re-ranked, is unknown without plan.images_per_s")
    alone = planned("plan.num_images=200000", of_file, "plan.images_per_s=null")["remarks"]
    assert alone == content["remarks"][:1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["plan.price_per_hour=-1"], "plan.price_per_hour=-1.0: expected 0 or a number above, and finite"),
        (["plan.price_per_hour=inf"], "plan.price_per_hour=inf: expected 0 or a number above, and finite"),
        (["plan.price_per_gib_read=-0.1"], "plan.price_per_gib_read=-0.1: expected 0"),
        (["plan.price_per_hour=1", "plan.photo_kib=0"], "plan.photo_kib=0.0: expected a number above 0"),
        (["plan.pairs_per_s=5"], "plan.pairs_per_s=5.0 counts in costs only; expected plan.price_per_hour=..., too"),
        (["plan.num_machines=5"], "plan.num_machines=5 counts in costs only"),
        (["plan.cpus_per_machine=5"], "plan.cpus_per_machine=5 counts in costs only"),
        (["plan.photo_kib=50"], "plan.photo_kib=50.0 counts in costs only; expected plan.price_per_hour=..., too"),
        (["plan.price_per_gib_read=0.1"], "plan.price_per_gib_read=0.1 counts in costs only"),
        (["plan.price_per_gib_month=0"], "plan.price_per_gib_month=0.0 counts in costs only"),
        (
            ["plan.price_per_hour=1", *MACHINES_GIVEN, "plan.pairs_per_s=5"],
            "plan.pairs_per_s=5.0 counts for queries only; expected plan.num_queries=..., too",
        ),
        (["describe.descriptors=rows.npy"], "plan.images_per_s=1000.0 counts for queries only; expected plan.num_q"),
        (["plan.num_candidates=50"], "plan.num_candidates=50 counts for queries only; expected plan.num_queries=..."),
        (
            ["plan.calibration_photos=9"],
            "plan.calibration_photos=9: nothing is measured with plan.images_per_s=...; expected one of the two",
        ),
        (
            ["plan.calibration_photos=9", "plan.images_per_s=null", "describe.descriptors=rows.npy"],
            "plan.calibration_photos=9: nothing is measured with describe.descriptors=...",
        ),
        (["plan.price_per_hour=1", "plan.num_machines=0"], "plan.num_machines=0: expected a number above 0"),
        (
            ["plan.price_per_hour=1", "plan.cpus_per_machine=8"],
            "plan.images_per_s=1000.0: of how many machines and CPUs is not known, so neither are costs; expected "
            "plan.num_machines=..., too",
        ),
        (["plan.price_per_hour=1", "plan.num_machines=8"], "expected plan.cpus_per_machine=..., too"),
        (
            ["plan.price_per_hour=1", "plan.num_machines=8", "plan.images_per_s=null"],
            "plan.num_machines=8: without plan.images_per_s=... the speed is that of the cluster at hand",
        ),
    ],
)
def test_mistakes_are_one_line(line: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        load(PlanConfig, ["plan.num_images=5", *LINE, *line])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
