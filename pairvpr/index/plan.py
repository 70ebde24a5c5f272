"""What an index of a given number of photos takes, before any is described: storage, memory, hours.

n photos, G descriptor width, L patches, D decoder width. The network itself is not counted, nor the photos.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pairvpr.config.schema import BuildConfig, IndexKind, ModelConfig
from pairvpr.errors import UserError
from pairvpr.index import choose

BYTES_OF_A_PHOTO = 100
"""Approximate bytes of a photo in the table of photos, on storage and in the driver's memory."""
PROCESS_BYTES = 200 << 20
"""Memory of an idle Ray worker that has imported this package."""
WORKING_BYTES = 4 * choose.BYTES_ADDED_AT_ONCE
"""Rows being added to an index, and faiss's temporary copies of them."""
COPIES_GATHERED = 2.5
"""Copies of a shard's descriptors while it is gathered: the parts, the whole, and its verification."""
COPIES_FILLED = 1.25
"""Copies of a shard's faiss index while it grows."""
COPIES_JOINED = 2
"""Copies of a group of shards while it is assembled: lists grow to at most twice their content."""
COPIES_OF_A_SAMPLE = 2
INSIST = "or index.allow_overcommit=true"


@dataclass(frozen=True, kw_only=True)
class NodeRoom:
    """A machine of the cluster: memory that Ray may use there, and CPUs."""

    memory_bytes: int
    num_cpus: int


@dataclass(frozen=True, kw_only=True)
class Room:
    """The resources available to an index. Unknown ones (no nodes, no disk) are not checked."""

    nodes: Sequence[NodeRoom] = ()
    disk_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class KindPlan:
    """A kind of index: what all shards take together in search, and whether that fits the budget."""

    kind: IndexKind
    factory: str
    num_lists: int
    bytes: int
    fits: bool


@dataclass(frozen=True, kw_only=True)
class DensePlan:
    """Bytes of the dense features (L, D) of all photos, if they are stored, at 32 and 16 bits per value."""

    fp32_bytes_per_image: int
    half_bytes_per_image: int
    fp32_bytes: int
    half_bytes: int


@dataclass(frozen=True, kw_only=True)
class StoragePlan:
    """Bytes of the finished index, and the peak while it is built."""

    index_bytes: int
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Peak memory of each kind of process.

    Tasks: gathering a shard's descriptors, training on a sample (0 = no training), filling a shard's faiss index. Then
    an actor that searches one shard or a group, and the driver with the table of photos. Then a service with all shards
    in one piece, its network aside, and the same while it holds two generations that share nothing.
    """

    gather_bytes: int
    learn_bytes: int
    fill_bytes: int
    search_bytes: int
    driver_bytes: int
    serve_bytes: int
    swap_bytes: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An index of `num_images` photos. `kind` is the one asked for, or `auto`'s choice; `hours` are for describing.

    The shards are searched in `num_groups` groups (`choose.num_groups`).

    `budget_problem` says why no kind fits, if none does; `kind` is then the smallest one, or the one asked for.
    """

    num_images: int
    model: str
    descriptor_dim: int
    num_shards: int
    images_per_shard: int
    num_groups: int
    index_kind: IndexKind
    kind: IndexKind
    budget_bytes: int
    budget_problem: str | None
    descriptors_bytes: int
    kinds: list[KindPlan]
    dense_features: DensePlan
    storage: StoragePlan
    memory: MemoryPlan
    images_per_s: float | None
    hours: float | None

    def problems(self, room: Room) -> list[str]:
        """One line for everything that does not fit, with the numbers and what to do."""
        return [
            *([self.budget_problem] if self.budget_problem else []),
            *_memory_problems(self, room.nodes),
            *_disk_problems(self, room.disk_bytes),
        ]

    def as_json(self) -> dict[str, Any]:
        """Plain values by the names of the fields; `problems` say what is in `budget_problem`."""
        content = asdict(self)
        del content["budget_problem"]
        return content


def plan_index(
    num_images: int, model: ModelConfig, config: BuildConfig, *, budget_bytes: float, images_per_s: float | None = None
) -> Plan:
    """The plan of the index that `config` asks for; `images_per_s` is the rate of the whole cluster's first stage.

    Raises `UserError` for more lists than so few photos can fill.
    """
    width = config.reduce_to or model.descriptor_dim
    num_lists = config.num_lists or choose.default_num_lists(num_images)
    num_shards = config.num_shards or choose.default_num_shards(num_images)
    kinds, problem = _wanted_kinds(num_images, width, budget_bytes, config)
    num_groups = choose.num_groups(kinds[0], num_shards, num_images, width, num_lists)
    return Plan(
        num_images=num_images,
        model=model.name,
        descriptor_dim=width,
        num_shards=num_shards,
        images_per_shard=-(-num_images // num_shards),
        num_groups=num_groups,
        index_kind=config.kind,
        kind=kinds[0],
        budget_bytes=int(budget_bytes),
        budget_problem=problem,
        descriptors_bytes=_descriptors_bytes(num_images, model.descriptor_dim),
        kinds=[_kind_plan(kind, num_images, width, num_lists, budget_bytes) for kind in choose.KINDS],
        dense_features=_dense_plan(num_images, model),
        storage=_storage_plan(num_images, model.descriptor_dim, width, num_lists, kinds),
        memory=_memory_plan(num_images, model.descriptor_dim, width, num_lists, num_shards, num_groups, kinds[0]),
        images_per_s=images_per_s,
        hours=None if images_per_s is None else num_images / images_per_s / 3600,
    )


def check_fits(plan: Plan, room: Room, config: BuildConfig) -> None:
    """Raise `UserError`, with the numbers, for anything that does not fit, unless `index.allow_overcommit` is set."""
    problems = [] if config.allow_overcommit else plan.problems(room)
    if problems:
        raise UserError(problems[0])


def _wanted_kinds(
    num_images: int, descriptor_dim: int, budget_bytes: float, config: BuildConfig
) -> tuple[list[IndexKind], str | None]:
    """What would be built, what next if its recall falls short, and why it does not fit, if so."""
    problem = None
    try:
        choose.kinds_to_try(num_images, descriptor_dim, budget_bytes, replace(config, allow_overcommit=False))
    except UserError as error:
        problem = str(error)
    kinds = choose.kinds_to_try(num_images, descriptor_dim, budget_bytes, replace(config, allow_overcommit=True))
    return (kinds[:1] if choose.KINDS[kinds[0]].is_exact else kinds), problem


def _kind_plan(kind: IndexKind, num_images: int, descriptor_dim: int, num_lists: int, budget_bytes: float) -> KindPlan:
    size = choose.index_bytes(kind, num_images, descriptor_dim, num_lists)
    return KindPlan(
        kind=kind,
        factory=choose.factory_string(kind, num_lists),
        num_lists=num_lists if choose.KINDS[kind].has_lists else 0,
        bytes=size,
        fits=size <= budget_bytes,
    )


def _descriptors_bytes(num_images: int, descriptor_dim: int) -> int:
    return 4 * descriptor_dim * num_images


def _dense_plan(num_images: int, model: ModelConfig) -> DensePlan:
    num_values = model.num_patches * model.decoder.embed_dim
    return DensePlan(
        fp32_bytes_per_image=4 * num_values,
        half_bytes_per_image=2 * num_values,
        fp32_bytes=4 * num_values * num_images,
        half_bytes=2 * num_values * num_images,
    )


def _storage_plan(
    num_images: int, described_dim: int, descriptor_dim: int, num_lists: int, kinds: Sequence[IndexKind]
) -> StoragePlan:
    """Part files copy the descriptors and are deleted before an index is built; each kind tried leaves files.

    Reduced descriptors lie beside those that they were made from.
    """
    ids_bytes = choose.BYTES_OF_AN_ID * num_images
    described = _descriptors_bytes(num_images, described_dim) + ids_bytes
    base = described + BYTES_OF_A_PHOTO * num_images
    if descriptor_dim != described_dim:
        base += _descriptors_bytes(num_images, descriptor_dim)
    files = [choose.index_bytes(kind, num_images, descriptor_dim, num_lists) - ids_bytes for kind in kinds]
    return StoragePlan(index_bytes=base + files[0], peak_bytes=base + max(described, sum(files)))


def _memory_plan(
    num_images: int,
    described_dim: int,
    descriptor_dim: int,
    num_lists: int,
    num_shards: int,
    num_groups: int,
    kind: IndexKind,
) -> MemoryPlan:
    num_rows = -(-num_images // num_shards)
    about, shard_bytes = choose.KINDS[kind], choose.index_bytes(kind, num_rows, descriptor_dim, num_lists)
    num_sampled = choose.num_training_rows(num_images, descriptor_dim, num_lists if about.has_lists else 0)
    sample_bytes = _descriptors_bytes(num_sampled, descriptor_dim)
    searched_bytes = shard_bytes
    if num_groups < num_shards:
        row_bytes, most_together = choose.bytes_per_row(kind, descriptor_dim), -(-num_shards // num_groups)
        searched_bytes += (COPIES_JOINED * most_together - 1) * num_rows * row_bytes
    open_bytes = choose.index_bytes(kind, num_images, descriptor_dim, num_lists) + BYTES_OF_A_PHOTO * num_images
    return MemoryPlan(
        gather_bytes=PROCESS_BYTES + int(COPIES_GATHERED * _descriptors_bytes(num_rows, described_dim)),
        learn_bytes=PROCESS_BYTES + COPIES_OF_A_SAMPLE * sample_bytes if about.needs_training else 0,
        fill_bytes=PROCESS_BYTES + WORKING_BYTES + int(COPIES_FILLED * shard_bytes),
        search_bytes=PROCESS_BYTES + searched_bytes,
        driver_bytes=PROCESS_BYTES + BYTES_OF_A_PHOTO * num_images,
        serve_bytes=PROCESS_BYTES + open_bytes,
        swap_bytes=PROCESS_BYTES + 2 * open_bytes,
    )


def _memory_problems(plan: Plan, nodes: Sequence[NodeRoom]) -> Iterator[str]:
    """For each step, the first node whose memory can't hold what would run there at once.

    One shard is gathered at a time, because describing the next one takes longer. When the index is measured, one task
    per CPU searches a group of shards; a single shard takes less then than while it is filled.
    """
    is_grouped = plan.num_groups < plan.num_shards
    shards = f"a shard of {plan.images_per_shard:,} photos"
    more_shards = f"more shards than index.num_shards={plan.num_shards}"
    for what, task_bytes, most_at_once, advice in (
        (f"gathering {shards}", plan.memory.gather_bytes, lambda _: 1, more_shards),
        ("learning from a sample", plan.memory.learn_bytes, lambda _: 1, "another index.kind"),
        (f"filling {shards}", plan.memory.fill_bytes, lambda node: node.num_cpus, more_shards),
        (
            "searching a group of shards" if is_grouped else f"searching {shards}",
            plan.memory.search_bytes,
            lambda node: min(plan.num_groups, node.num_cpus if is_grouped else node.num_cpus // 2),
            "another index.kind" if is_grouped else more_shards,
        ),
    ):
        for node in nodes:
            at_once = max(1, min(plan.num_shards, most_at_once(node)))
            if at_once * task_bytes > node.memory_bytes:
                tasks = f", {at_once} at once {size_text(at_once * task_bytes)}" if at_once > 1 else ""
                yield (
                    f"{what} takes {size_text(task_bytes)} of memory{tasks}, and a node has "
                    f"{size_text(node.memory_bytes)}; expected {advice}, larger nodes, {INSIST}"
                )
                break


def _disk_problems(plan: Plan, disk_bytes: int | None) -> Iterator[str]:
    if disk_bytes is not None and plan.storage.peak_bytes > disk_bytes:
        yield (
            f"the index of {plan.num_images:,} photos takes {size_text(plan.storage.index_bytes)} of disk, and up to "
            f"{size_text(plan.storage.peak_bytes)} while it is made; there are {size_text(disk_bytes)} for it; "
            f"expected another disk, {INSIST}"
        )


def size_text(num_bytes: float) -> str:
    """Bytes for people."""
    for unit, unit_bytes in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= unit_bytes:
            return f"{num_bytes / unit_bytes:.2f} {unit}"
    return f"{num_bytes / 2**10:.2f} KiB"


def table(plan: Plan, source_of_speed: str) -> str:
    """The plan for people; `source_of_speed` says where `images_per_s` comes from."""
    asked = "" if plan.index_kind is plan.kind else f", which index.kind={plan.index_kind} tries first"
    dense, memory, storage = plan.dense_features, plan.memory, plan.storage
    tasks = {
        "gather": memory.gather_bytes,
        "learn": memory.learn_bytes,
        "fill": memory.fill_bytes,
        "search": memory.search_bytes,
        "driver": memory.driver_bytes,
        "serve": memory.serve_bytes,
        "swap": memory.swap_bytes,
    }
    rows = {
        "descriptors": size_text(plan.descriptors_bytes),
        "dense, fp32": f"{size_text(dense.fp32_bytes)}, {size_text(dense.fp32_bytes_per_image)} a photo",
        "dense, 16 bits": f"{size_text(dense.half_bytes)}, {size_text(dense.half_bytes_per_image)} a photo",
        "storage": f"{size_text(storage.index_bytes)}, before it is finished at most {size_text(storage.peak_bytes)}",
        "memory of a process": ", ".join(f"{step} {size_text(size)}" for step, size in tasks.items() if size),
    }
    if plan.images_per_s is not None and plan.hours is not None:
        rows["describing"] = f"{plan.hours:,.2f} hours at {plan.images_per_s:,.1f} photos/s ({source_of_speed})"
    lines = [
        f"{plan.num_images:,} photos in {plan.num_shards:,} shards of at most {plan.images_per_shard:,}, "
        f"model {plan.model} with {plan.descriptor_dim} values a descriptor",
        "",
        f"{'index in memory':<22}{'size':>12}   {'in ' + size_text(plan.budget_bytes):<16}faiss factory",
        *(
            f"{each.kind:<22}{size_text(each.bytes):>12}   {'fits' if each.fits else 'too large':<16}{each.factory}"
            for each in plan.kinds
        ),
        f"to be built: {plan.kind}{asked}",
        "",
        *(f"{what:<22}{text}" for what, text in rows.items()),
    ]
    return "\n".join(lines)
