"""Which kind of index: the memory that each kind takes, and the kinds that fit a budget.

n rows, G descriptor width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pairvpr.config.schema import BuildConfig, IndexKind
from pairvpr.errors import UserError

GIB = 2**30
BYTES_OF_AN_ID = 8
ROWS_PER_LIST_IN_TRAINING = 39
"""The fewest rows per list that faiss's k-means accepts without a warning."""
MOST_LISTS, FEWEST_LISTS = 65_536, 16
RABITQ_FACTORS_BYTES = 8
IMAGES_PER_SHARD = 250_000
BYTES_ADDED_AT_ONCE = 32 << 20
BYTES_TOGETHER, ROWS_OF_A_LIST_TOGETHER = 512 << 20, 256
"""Shards of one-bit codes are grouped until a group is this large, or its lists this long (`num_groups`)."""
MOST_TRAINING_BYTES = 640 << 20
ROWS_PER_LIST, FEWEST_TRAINING_ROWS = 64, 1 << 16
"""The most bytes of the sample that an index is trained on."""
NUM_ITERATIONS = 10
"""Of k-means, when lists are learnt."""
NUM_HELD_OUT = 256
"""The most rows that an index is not trained on, and that measure its recall."""


@dataclass(frozen=True)
class KindOfIndex:
    """A way to store descriptors for search, and its properties."""

    kind: IndexKind
    codec: str
    """The faiss factory string of a stored row."""
    bits_per_value: int
    has_lists: bool
    is_rescored: bool = False
    """Whether codes only produce a short list, whose distances are computed from the stored descriptors."""

    @property
    def is_exact(self) -> bool:
        """Whether every query is compared with every stored row."""
        return not self.has_lists

    @property
    def needs_training(self) -> bool:
        """Whether the index is trained on a sample of the rows before any is added."""
        return self.has_lists or self.kind is IndexKind.flat_8bit


KINDS = {
    about.kind: about
    for about in (
        KindOfIndex(IndexKind.flat, "Flat", 32, has_lists=False),
        KindOfIndex(IndexKind.flat_fp16, "SQfp16", 16, has_lists=False),
        KindOfIndex(IndexKind.flat_8bit, "SQ8", 8, has_lists=False),
        KindOfIndex(IndexKind.ivf_fp16, "SQfp16", 16, has_lists=True),
        KindOfIndex(IndexKind.ivf_8bit, "SQ8", 8, has_lists=True),
        KindOfIndex(IndexKind.ivf_rabitq, "RaBitQ", 1, has_lists=True, is_rescored=True),
    )
}
PREFERRED = (IndexKind.flat, IndexKind.ivf_fp16, IndexKind.ivf_8bit, IndexKind.ivf_rabitq)
"""What `auto` tries, in order: an exact kind if it fits, then the most accurate codes that fit."""


def default_num_shards(num_images: int) -> int:
    """Shards of an index, unless `index.num_shards` says otherwise."""
    return max(1, -(-num_images // IMAGES_PER_SHARD))


def num_training_rows(num_rows: int, descriptor_dim: int, num_lists: int) -> int:
    """Rows of the training sample, bounded by memory whatever n is; 0 without lists."""
    most = MOST_TRAINING_BYTES // (4 * descriptor_dim)
    return min(num_rows, most, max(ROWS_PER_LIST * num_lists, FEWEST_TRAINING_ROWS))


def default_num_lists(num_rows: int) -> int:
    """A power of two near 2 sqrt(n): scanning the visited lists then costs about as much as choosing them."""
    wanted = 2 ** round(math.log2(max(1.0, 2 * math.sqrt(num_rows))))
    return max(FEWEST_LISTS, min(MOST_LISTS, wanted))


def factory_string(kind: IndexKind, num_lists: int) -> str:
    """faiss's name of the index."""
    about = KINDS[kind]
    return f"IVF{num_lists},{about.codec}" if about.has_lists else about.codec


def bytes_per_row(kind: IndexKind, descriptor_dim: int) -> int:
    """Bytes of one row in a loaded index, including its image id."""
    about = KINDS[kind]
    bytes_of_codes = descriptor_dim * about.bits_per_value // 8
    if about.is_rescored:
        bytes_of_codes += RABITQ_FACTORS_BYTES
    return bytes_of_codes + BYTES_OF_AN_ID * (2 if about.has_lists else 1)  # lists name their rows


def index_bytes(kind: IndexKind, num_rows: int, descriptor_dim: int, num_lists: int | None = None) -> int:
    """Bytes of all shards together when loaded; the list centroids are shared."""
    centres = 0
    if KINDS[kind].has_lists:
        centres = 4 * descriptor_dim * (num_lists or default_num_lists(num_rows))
    return num_rows * bytes_per_row(kind, descriptor_dim) + centres


def num_groups(kind: IndexKind, num_shards: int, num_rows: int, descriptor_dim: int, num_lists: int) -> int:
    """The number of groups of shards; a group is searched as one index. For most kinds, a group is one shard.

    RaBitQ preprocesses the query once per list per index, at the cost of scanning about 150 codes. With short lists in
    many shards that would be nearly all of the time. Once lists are long enough, further groups only add parallelism.
    """
    if not KINDS[kind].is_rescored:
        return num_shards
    num_bytes = num_rows * bytes_per_row(kind, descriptor_dim)
    wanted = max(-(-num_bytes // BYTES_TOGETHER), num_rows // (ROWS_OF_A_LIST_TOGETHER * num_lists), 1)
    return min(num_shards, wanted)


def kinds_that_fit(num_rows: int, descriptor_dim: int, budget_bytes: float, config: BuildConfig) -> list[IndexKind]:
    """The kinds of `PREFERRED` that fit the budget, best first. With too few rows for lists, flat alone."""
    num_lists = config.num_lists or default_num_lists(num_rows)
    enough = num_rows >= ROWS_PER_LIST_IN_TRAINING * num_lists
    return [
        kind
        for kind in PREFERRED
        if (enough or not KINDS[kind].has_lists)
        and index_bytes(kind, num_rows, descriptor_dim, num_lists) <= budget_bytes
    ]


def kinds_to_try(num_rows: int, descriptor_dim: int, budget_bytes: float, config: BuildConfig) -> list[IndexKind]:
    """What to build, and what to try next if its measured recall falls short: `index.kind`, or what `auto` resolves to.

    Raises `UserError`, with the numbers, where nothing fits and `index.allow_overcommit` does not insist.
    """
    budget = f"{budget_bytes / GIB:.2f} GiB (index.memory_budget_gib)"
    if config.kind is not IndexKind.auto:
        _check_enough_rows(num_rows, config)
        needed = index_bytes(config.kind, num_rows, descriptor_dim, config.num_lists)
        if needed > budget_bytes and not config.allow_overcommit:
            raise UserError(
                f"index.kind={config.kind}: {num_rows:,} x {descriptor_dim} descriptors take {needed / GIB:.2f} GiB in "
                f"search, more than {budget}; expected {_smaller(num_rows, descriptor_dim, config, needed)}"
                "a larger budget, or index.allow_overcommit=true"
            )
        return [config.kind]
    fitting = kinds_that_fit(num_rows, descriptor_dim, budget_bytes, config)
    if fitting:
        return fitting
    smallest = min(PREFERRED, key=lambda kind: index_bytes(kind, num_rows, descriptor_dim, config.num_lists))
    if config.allow_overcommit:
        return [smallest]
    needed = index_bytes(smallest, num_rows, descriptor_dim, config.num_lists)
    raise UserError(
        f"index.kind=auto: no kind of index for {num_rows:,} x {descriptor_dim} descriptors fits into {budget}: the "
        f"smallest, {smallest}, takes {needed / GIB:.2f} GiB; expected a larger budget, or index.allow_overcommit=true"
    )


def _check_enough_rows(num_rows: int, config: BuildConfig) -> None:
    num_lists = config.num_lists or default_num_lists(num_rows)
    if KINDS[config.kind].has_lists and num_rows < num_lists:
        raise UserError(
            f"index.kind={config.kind}: {num_rows:,} photos are too few for {num_lists:,} lists; expected "
            "index.kind=flat "
            "or fewer index.num_lists"
        )


def _smaller(num_rows: int, descriptor_dim: int, config: BuildConfig, needed: int) -> str:
    """Kinds that take less memory, as the start of a list of choices."""
    sizes = {kind: index_bytes(kind, num_rows, descriptor_dim, config.num_lists) for kind in KINDS}
    smaller = [f"{kind} ({size / GIB:.2f} GiB)" for kind, size in sizes.items() if size < needed]
    return f"{', '.join(smaller)}, " if smaller else ""
