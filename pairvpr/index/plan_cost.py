"""Hours and dollars of a planned index, step by step, for the exact kind, 8-bit lists and RaBitQ.

Work on rows is counted in comparisons of two descriptors, whose rates `speed.py` measures. All machines are paid from
the first step to the last, also while a single task works. Waiting for the store is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pairvpr.config.schema import IndexKind
from pairvpr.index import choose
from pairvpr.index.plan import Plan, size_text

KINDS = (IndexKind.flat, IndexKind.ivf_8bit, IndexKind.ivf_rabitq)
GIB = 2**30
STEPS = (
    *("describe", "learn", "fill", "measure"),
    *("describe queries", "search", "describe candidates", "score pairs"),
)
PROBED_SHARE = 1 / 64
"""Of all lists, assumed to be visited in a search: what the measured recall chose for 2.8 million rows."""
TRIED_SHARE = 4 * PROBED_SHARE
"""Of all lists, visited in all searches together that measure recall: 1/512, twice as many, and so on."""


@dataclass(frozen=True, kw_only=True)
class Machines:
    """Machines of one kind, and what one costs in dollars an hour."""

    number: int
    cpus_each: int
    price_per_hour: float


@dataclass(frozen=True, kw_only=True)
class Store:
    """Where photos and index lie: mean size of a photo's file, dollars for a GiB read, and for a GiB kept a month."""

    photo_bytes: float
    price_per_gib_read: float
    price_per_gib_month: float


@dataclass(frozen=True, kw_only=True)
class CpuRates:
    """What one CPU does in a second: comparisons of rows with centres, of queries with stored rows, rows stored."""

    centres: float
    scanned: Mapping[IndexKind, float]
    added: Mapping[IndexKind, float]


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What all machines do in a second (None = unknown), and the work of a CPU.

    The first stage describes `images_per_s` photos; Pair-VPR's network describes `dense_per_s` for re-ranking.
    """

    images_per_s: float | None
    dense_per_s: float | None
    pairs_per_s: float | None
    cpu: CpuRates


@dataclass(frozen=True)
class Work:
    """Queries to answer (None = only an index is made), candidates of each, and threads that learn the lists.

    With `rows_from_file`, descriptors are copied from a file: the first stage describes no photo.
    """

    num_queries: int | None
    num_candidates: int
    num_build_threads: int
    rows_from_file: bool = False


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """A step: hours and dollars (None = its rate is unknown), and bytes read from the store."""

    step: str
    hours: float | None
    dollars: float | None
    read_bytes: float


@dataclass(frozen=True, kw_only=True)
class KindCost:
    """All steps with one kind of index, their sums over what is known, and what its files cost a month."""

    kind: IndexKind
    steps: list[StepCost]
    hours: float
    dollars: float
    read_bytes: float
    read_dollars: float
    kept_bytes: int
    kept_dollars_a_month: float


def plan_cost(plan: Plan, machines: Machines, store: Store, rates: Rates, work: Work) -> KindCost:
    """The cost of `plan`, whose kind is one of `KINDS`."""
    num_cpus = machines.number * machines.cpus_each
    hours = [*_building_hours(plan, rates, work, num_cpus), *_answering_hours(plan, rates, work, num_cpus)]
    read = _read_bytes(plan, store, work)
    steps = [
        StepCost(
            step=step,
            hours=its_hours,
            dollars=None if its_hours is None else its_hours * machines.number * machines.price_per_hour,
            read_bytes=read[step],
        )
        for step, its_hours in hours
    ]
    read_bytes = sum(step.read_bytes for step in steps)
    return KindCost(
        kind=plan.kind,
        steps=steps,
        hours=sum(step.hours or 0.0 for step in steps),
        dollars=sum(step.dollars or 0.0 for step in steps),
        read_bytes=read_bytes,
        read_dollars=read_bytes / GIB * store.price_per_gib_read,
        kept_bytes=plan.storage.index_bytes,
        kept_dollars_a_month=plan.storage.index_bytes / GIB * store.price_per_gib_month,
    )


def _building_hours(plan: Plan, rates: Rates, work: Work, num_cpus: int) -> list[tuple[str, float | None]]:
    rows, cpu, num_lists = plan.num_images, rates.cpu, _num_lists(plan)
    steps: list[tuple[str, float | None]] = [("describe", _first_stage_hours(rows, rates, work))]
    if num_lists:
        sample = choose.num_training_rows(rows, plan.descriptor_dim, num_lists)
        learning = choose.NUM_ITERATIONS * sample * num_lists / cpu.centres
        steps.append(("learn", learning / min(work.num_build_threads, num_cpus) / 3600))
    filling = rows / cpu.added[plan.kind] + rows * num_lists / cpu.centres
    steps.append(("fill", filling / _busy(num_cpus, plan.num_shards) / 3600))
    if num_lists:
        exact = rows / cpu.scanned[IndexKind.flat]
        tried = rows * TRIED_SHARE / cpu.scanned[plan.kind]
        steps.append(("measure", choose.NUM_HELD_OUT * (exact + tried) / _busy(num_cpus, plan.num_groups) / 3600))
    return steps


def _answering_hours(plan: Plan, rates: Rates, work: Work, num_cpus: int) -> list[tuple[str, float | None]]:
    if work.num_queries is None:
        return []
    num_lists, scanned = _num_lists(plan), plan.num_images * (PROBED_SHARE if _num_lists(plan) else 1)
    searching = work.num_queries * (scanned / rates.cpu.scanned[plan.kind] + num_lists / rates.cpu.centres)
    pairs = work.num_queries * min(work.num_candidates, plan.num_images)
    return [
        ("describe queries", _first_stage_hours(work.num_queries, rates, work)),
        ("search", searching / _busy(num_cpus, plan.num_groups) / 3600),
        ("describe candidates", _hours(pairs, rates.dense_per_s)),
        ("score pairs", _hours(pairs, rates.pairs_per_s)),
    ]


def _read_bytes(plan: Plan, store: Store, work: Work) -> dict[str, float]:
    """Bytes that each step reads from the store.

    Descriptors are read as part files, or from the user's file, first, then as shards.
    """
    num_queries, described = work.num_queries or 0, plan.descriptors_bytes
    index_bytes = next(each.bytes for each in plan.kinds if each.kind is plan.kind)
    sample = choose.num_training_rows(plan.num_images, plan.descriptor_dim, _num_lists(plan))
    row_bytes = described / plan.num_images
    return {
        "describe": (0.0 if work.rows_from_file else plan.num_images * store.photo_bytes) + described,
        "learn": 4.0 * plan.descriptor_dim * sample + described,  # checks all, then reads the sample
        "fill": described,
        "measure": described + index_bytes,
        "describe queries": num_queries * (row_bytes if work.rows_from_file else store.photo_bytes),
        "search": index_bytes + (described if choose.KINDS[plan.kind].is_rescored else 0),
        "describe candidates": num_queries * min(work.num_candidates, plan.num_images) * store.photo_bytes,
        "score pairs": 0.0,
    }


def _num_lists(plan: Plan) -> int:
    return next(each.num_lists for each in plan.kinds if each.kind is plan.kind)


def _busy(num_cpus: int, num_pieces: int) -> int:
    """CPUs that have work when it is cut into so many pieces."""
    return min(num_cpus, num_pieces)


def _first_stage_hours(num_photos: int, rates: Rates, work: Work) -> float | None:
    return 0.0 if work.rows_from_file else _hours(num_photos, rates.images_per_s)


def _hours(number: float, per_s: float | None) -> float | None:
    return None if per_s is None else number / per_s / 3600


def cost_table(costs: Sequence[KindCost], machines: Machines, store: Store) -> str:
    """The costs for people, a column for each kind."""
    used = {step.step for cost in costs for step in cost.steps}
    heads = "".join(f"{cost.kind:>24}" for cost in costs)
    lines = [
        f"{machines.number:,} machines of {machines.cpus_each:,} CPUs at ${machines.price_per_hour:,.2f} an hour each",
        "",
        f"{'':<20}{heads}",
        f"{'':<20}" + f"{'hours':>12}{'dollars':>12}" * len(costs),
    ]
    for name in (step for step in STEPS if step in used):
        of_kinds = [next((step for step in cost.steps if step.step == name), None) for cost in costs]
        cells = "".join(
            f"{'-':>12}{'-':>12}" if step is None else f"{_number(step.hours):>12}{_number(step.dollars):>12}"
            for step in of_kinds
        )
        lines.append(f"{name:<20}{cells}")
    lines += [
        f"{'all of it':<20}" + "".join(f"{_number(cost.hours):>12}{_number(cost.dollars):>12}" for cost in costs),
        f"{'read from store':<20}"
        + "".join(f"{size_text(cost.read_bytes):>12}{_number(cost.read_dollars):>12}" for cost in costs),
        f"{'kept, a month':<20}"
        + "".join(f"{size_text(cost.kept_bytes):>12}{_number(cost.kept_dollars_a_month):>12}" for cost in costs),
        "",
        f"photos of {size_text(store.photo_bytes)}, ${store.price_per_gib_read:g} for a GiB read, "
        f"${store.price_per_gib_month:g} for a GiB kept a month; requests and waiting for the store are not counted",
    ]
    unknown = {step.step for cost in costs for step in cost.steps if step.hours is None}
    if unknown:
        advice = "; give plan.pairs_per_s=..." if "score pairs" in unknown else ""
        lines.append(f"?: no rate is known, so it is not in the sums{advice}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:,.2f}" if value >= 0.005 or value == 0 else "<0.01"
