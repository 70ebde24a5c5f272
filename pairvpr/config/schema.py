"""The settings of the inference jobs, as dataclasses; YAML and the command line fill them in.

Units are in the names (`_m`, `_px`, `_gib`), `num_` counts things. A field's doc line is what `--help` prints.
Settings marked *scheduling* decide where and when work runs and never change a result.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any

from pairvpr.config.benchmark_schema import BenchmarkConfig, BenchmarkJobConfig, PositionColumns, PositionSource
from pairvpr.config.checks import require, require_positive, require_text

NUM_CANDIDATES = 100
"""K, unless it is set: those that are re-ranked for each query."""
EVALUATED_CANDIDATES = 1000
"""Kept for each query of an evaluation, unless it is set."""


class Ffn(StrEnum):
    """The feed-forward network of an encoder block."""

    mlp = "mlp"
    swiglu = "swiglu"


class Precision(StrEnum):
    """Number format of the network's matrix products."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class IndexKind(StrEnum):
    """How the descriptors of an index are kept for search (docs/index.md)."""

    auto = "auto"
    flat = "flat"
    flat_fp16 = "flat_fp16"
    flat_8bit = "flat_8bit"
    ivf_fp16 = "ivf_fp16"
    ivf_8bit = "ivf_8bit"
    ivf_rabitq = "ivf_rabitq"


class DenseFeatures(StrEnum):
    """Where re-ranking gets the database photos' dense features from."""

    recompute = "recompute"
    cache = "cache"
    store = "store"


class DecisionRule(StrEnum):
    """What orders the candidates that were re-ranked."""

    pair = "pair"
    fused = "fused"
    consensus = "consensus"


class StoredAs(StrEnum):
    """Number format of stored dense features: half (bfloat16 where model.precision is bf16, else float16) or int8."""

    half = "half"
    int8 = "int8"


def require_gpus(config: DescribeConfig | SearchConfig | RerankConfig, prefix: str) -> None:
    number = config.num_gpus_per_actor
    require(
        number is None or 0 <= number <= 1 or (1 < number < math.inf and number == int(number)),
        f"{prefix}.num_gpus_per_actor={number}: expected 0 or more, above 1 a whole number",
    )


@dataclass(kw_only=True, slots=True)
class EncoderConfig:
    """The ViT that describes an image (a DINOv2 ViT, with or without registers)."""

    embed_dim: int = 768
    """Width C of the encoder."""
    depth: int = 12
    """Number of blocks."""
    num_heads: int = 12
    """Attention heads; must divide embed_dim."""
    ffn: Ffn = Ffn.mlp
    """Feed-forward network of a block: mlp (x4) or swiglu."""
    num_registers: int = 4
    """Register tokens, dropped from the output."""
    pretrain_image_size_px: int = 518
    """Image side that the stored position table is for."""
    pos_embed_antialias: bool = True
    """Whether the position table is resized with anti-aliasing (true for models with registers)."""
    pos_embed_offset: float = 0.0
    """Added to the grid size in the resize factor (0.1 for models without registers, 0 = explicit size)."""
    num_trainable_blocks: int = 6
    """The last blocks, which training changes; the rest is frozen."""

    def __post_init__(self) -> None:
        require_positive(self, "model.encoder", "embed_dim", "depth", "num_heads", "pretrain_image_size_px")
        require(self.num_registers >= 0, f"model.encoder.num_registers={self.num_registers}: expected 0 or more")
        require(
            self.embed_dim % self.num_heads == 0,
            f"model.encoder.num_heads={self.num_heads} does not divide model.encoder.embed_dim={self.embed_dim}",
        )
        require(
            0 <= self.num_trainable_blocks <= self.depth,
            f"model.encoder.num_trainable_blocks={self.num_trainable_blocks}: expected 0 to depth={self.depth}",
        )


@dataclass(kw_only=True, slots=True)
class DecoderConfig:
    """The cross-attention decoder that reads a pair."""

    embed_dim: int = 768
    """Width D of the decoder; divisible by 4."""
    depth: int = 12
    """Number of blocks."""
    num_heads: int = 12
    """Attention heads; must divide embed_dim."""

    def __post_init__(self) -> None:
        require_positive(self, "model.decoder", "embed_dim", "depth", "num_heads")
        require(
            self.embed_dim % self.num_heads == 0,
            f"model.decoder.num_heads={self.num_heads} does not divide model.decoder.embed_dim={self.embed_dim}",
        )
        require(
            self.embed_dim % 4 == 0,
            f"model.decoder.embed_dim={self.embed_dim}: expected a multiple of 4 (sine-cosine positions)",
        )


MAX_MEGAPIXELS = 180.0
"""Of a photo, unless `model.max_megapixels` says otherwise: panoramas of 16,384 x 8,192 and somewhat more."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The network and its weights."""

    name: str = "vitb"
    """What reports call the model."""
    image_size_px: int = 322
    """Side of the square that every photo is resized to."""
    patch_size_px: int = 14
    """Side of a patch; must divide image_size_px."""
    scaled_decoding: bool = False
    """Decode large JPEGs at 1/2, 1/4 or 1/8, sides at least 2 x image_size_px: faster, descriptors change a little."""
    max_megapixels: float = MAX_MEGAPIXELS
    """Photos of more pixels are rejected before they are decoded: memory grows with them."""
    descriptor_dim: int = 512
    """Width G of the global descriptor."""
    weights: str | None = None
    """Path or URL (s3://, hf://, ...) of a .pth or .safetensors state dict; null = untrained, seeded."""
    precision: Precision = Precision.fp32
    """fp32 (exact), bf16 or fp16."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)

    def __post_init__(self) -> None:
        require_text(self, "model.", "weights")
        require_positive(self, "model", "image_size_px", "patch_size_px", "max_megapixels", "descriptor_dim")
        for name, size_px in (
            ("image_size_px", self.image_size_px),
            ("encoder.pretrain_image_size_px", self.encoder.pretrain_image_size_px),
        ):
            require(
                size_px % self.patch_size_px == 0,
                f"model.{name}={size_px}: expected a multiple of model.patch_size_px={self.patch_size_px}",
            )

    def settings(self) -> dict[str, Any]:
        """What of it decides the bytes of a result, in plain values, the weights aside.

        `scaled_decoding` and `max_megapixels` are there only when they are set: what was made before there were such
        settings is like what is made without them.
        """
        values = asdict(self)
        del values["weights"], values["encoder"]["num_trainable_blocks"]
        if not self.scaled_decoding:
            del values["scaled_decoding"]
        if self.max_megapixels == MAX_MEGAPIXELS:
            del values["max_megapixels"]
        return values

    @property
    def num_patches(self) -> int:
        """L, the number of patches of an image."""
        return (self.image_size_px // self.patch_size_px) ** 2


@dataclass(kw_only=True)
class DescribePassConfig:
    """Photos -> global descriptors: one forward pass."""

    batch_size: int = 16
    """Photos in one forward pass; cut from the manifest by position, so it decides rounding."""
    num_threads_per_actor: int = 2
    """CPU threads of the network in one actor; decides rounding."""

    def __post_init__(self) -> None:
        require_positive(self, "describe", "batch_size", "num_threads_per_actor")


@dataclass(kw_only=True)
class DescribeConfig(DescribePassConfig):
    """Photos -> global descriptors, with Ray Data."""

    num_actors: int | None = None
    """Scheduling: model actors; null = one for each GPU, or one for every two CPUs."""
    num_gpus_per_actor: float | None = None
    """GPUs of one actor, 0 = its CPU threads; null = 1 where the cluster has GPUs. A GPU rounds unlike a CPU."""
    memory_gib: float = 1.0
    """Scheduling: object-store memory for decoded photos in flight, whatever the number of photos."""

    def __post_init__(self) -> None:
        DescribePassConfig.__post_init__(self)
        require_positive(self, "describe", "num_actors", "memory_gib")
        require_gpus(self, "describe")


@dataclass(kw_only=True)
class SearchConfig:
    """Descriptors of queries -> candidates, from the shards of an index."""

    num_retrieved: int | None = None
    """Candidates kept for each query, if more than rerank.num_candidates; null = 1,000 in evaluate, else no more."""
    num_probes: int | None = None
    """Lists that a query visits in an index of kind ivf_*; null = as many as the index was measured to need."""
    num_threads_per_actor: int = 2
    """CPU threads of faiss in one shard actor."""
    num_actors: int | None = None
    """Scheduling: shard actors; null = one for each shard (of ivf_rabitq: group), at most one for every two CPUs."""
    num_gpus_per_actor: float = 0.0
    """Scheduling: GPUs of a shard actor; they make the short lists of a flat index, and need faiss-gpu."""
    memory_map: bool = False
    """Scheduling: shards stay in local files and are mapped, but for groups of ivf_rabitq; false = they are read."""
    cache_dir: str | None = None
    """Scheduling: folder for shards of an index that lies elsewhere; null = pairvpr-cache among temporary ones."""
    cache_gib: float = 20.0
    """Scheduling: most bytes kept in it, the least recently used are deleted; one shard always fits."""

    def __post_init__(self) -> None:
        require_text(self, "index.", "cache_dir")
        require_positive(
            self, "index", "num_retrieved", "num_probes", "num_threads_per_actor", "num_actors", "cache_gib"
        )
        require_gpus(self, "index")

    def num_kept(self, num_candidates: int) -> int:
        """Candidates that are kept for each query, of which the first `num_candidates` are re-ranked."""
        return max(num_candidates, self.num_retrieved or 0)

    def settings(self) -> dict[str, Any]:
        """What of it decides which candidates are found, in plain values."""
        return {
            "num_retrieved": self.num_retrieved,
            "num_probes": self.num_probes,
            "num_threads_per_actor": self.num_threads_per_actor,
        }


@dataclass(kw_only=True)
class ShardsConfig:
    """How the shards of an index are built."""

    num_shards: int | None = None
    """Contiguous shards of the photos that are described; null = one for every 250,000 photos."""
    memory_budget_gib: float | None = None
    """Memory that all shards together may take in search; null = half of that of the cluster."""
    target_recall: float = 0.95
    """Wanted recall of the exact 100 nearest, measured after the build; for ivf_* kinds."""
    num_lists: int | None = None
    """Lists of an ivf_* index; null = by the number of photos."""
    num_build_threads: int = 2
    """CPU threads that learn an index and fill a shard; decides rounding of ivf_* kinds."""
    allow_overcommit: bool = False
    """Scheduling: build also what memory or disk can't hold."""

    def __post_init__(self) -> None:
        require_positive(self, "index", "num_shards", "memory_budget_gib", "num_lists", "num_build_threads")
        require(0 < self.target_recall <= 1, f"index.target_recall={self.target_recall}: expected above 0, at most 1")


@dataclass(kw_only=True)
class BuildConfig(ShardsConfig):
    """How an index is cut, and what kind it is."""

    kind: IndexKind = IndexKind.auto
    """flat, flat_fp16, flat_8bit (exact), ivf_fp16, ivf_8bit, ivf_rabitq (approximate); auto = by memory and recall."""

    def __post_init__(self) -> None:
        ShardsConfig.__post_init__(self)
        require(
            self.num_lists is None or self.kind in (IndexKind.auto, *IVF_KINDS),
            f"index.num_lists={self.num_lists}: index.kind={self.kind} has no lists; expected one of "
            f"{', '.join(IVF_KINDS)}, or null",
        )


IVF_KINDS = (IndexKind.ivf_fp16, IndexKind.ivf_8bit, IndexKind.ivf_rabitq)


@dataclass(kw_only=True)
class IndexConfig(SearchConfig, BuildConfig):
    """The index of an evaluation: built where it is missing, reused where it is finished."""

    path: str | None = None
    """Index directory (path or URL), which runs may share, one after another until it is finished; null = OUT/index."""

    def __post_init__(self) -> None:
        SearchConfig.__post_init__(self)
        BuildConfig.__post_init__(self)
        require_text(self, "index.", "path")

    def num_kept(self, num_candidates: int) -> int:
        """As `SearchConfig` says; an evaluation keeps as many as curves of recall@N are drawn for."""
        return max(num_candidates, self.num_retrieved or EVALUATED_CANDIDATES)

    def settings(self) -> dict[str, Any]:
        """What of it decides which candidates are found, in plain values."""
        built = ("kind", "memory_budget_gib", "target_recall", "num_lists", "num_build_threads")
        return {
            **super().settings(),
            "num_retrieved": self.num_retrieved or EVALUATED_CANDIDATES,
            **{name: getattr(self, name) for name in built},
        }


@dataclass(kw_only=True)
class OpenIndexConfig(SearchConfig):
    """An index that exists."""

    path: str = "???"
    """Index directory (path or URL) written by build_index or evaluate."""

    def __post_init__(self) -> None:
        SearchConfig.__post_init__(self)
        require_text(self, "index.", "path")


@dataclass(kw_only=True, slots=True)
class RerankConfig:
    """Candidates -> pair scores, in a pool of Ray actors."""

    num_candidates: int = NUM_CANDIDATES
    """Candidates K re-ranked for each query (at most the number of database photos)."""
    batch_size: int = 16
    """Pairs in one forward pass: some candidates with all queries of the unit that have them. Decides rounding."""
    queries_per_unit: int = 8
    """Queries of one work unit, which share candidates; what a dying actor loses. Decides rounding."""
    num_threads_per_actor: int = 2
    """CPU threads of the network in one actor; decides rounding."""
    num_actors: int | None = None
    """Scheduling: re-ranking actors; null = one for each GPU, or one for every two CPUs."""
    num_gpus_per_actor: float | None = None
    """GPUs of one actor, 0 = its CPU threads; null = 1 where the cluster has GPUs. A GPU rounds unlike a CPU."""
    dense_features: DenseFeatures = DenseFeatures.cache
    """Scheduling: recompute them in each unit, cache those used last, or store all candidates' before re-ranking."""
    cache_gib: float = 0.5
    """Scheduling: what an actor of dense_features=cache keeps in memory from unit to unit."""
    gpu_cache_gib: float = 2.0
    """Scheduling: what it keeps on its GPU, if it has one; what is dropped there goes to memory."""
    stored_as: StoredAs = StoredAs.half
    """With dense_features=store: 16 bits a value, or 8 with a scale for each patch."""
    store_path: str | None = None
    """Scheduling: with dense_features=store: directory (path or URL) of the store; null = OUT/dense."""
    store_whole_database: bool = False
    """Scheduling: with dense_features=store: keep every photo of the database, so that other runs can use the store."""
    num_loading_threads: int = 1
    """Scheduling: threads of an actor that read and decode photos, or stored features, ahead of the network."""
    second_direction: int | None = None
    """Candidates with the best logit(query, candidate) that are also scored the other way round; null = all."""
    calibration: str | None = None
    """File (path or URL) of ray_jobs.calibrate: predictions get a confidence, the probability of being right."""
    not_in_map_below: float | None = None
    """A query whose confidence is below this is answered "not in this map" (in_map); needs rerank.calibration."""
    adaptive: bool = False
    """Score a query's candidates batch by batch, until the best one is beyond the calibrated margin."""
    decision: DecisionRule = DecisionRule.pair
    """What orders the answers: pair (scores alone, as published), fused (and distance), consensus (and neighbours)."""
    report_candidates: list[int] | None = None
    """Numbers of candidates, ascending, that the audit of a run reports on; null = those of 10, 20, 50, ... and K."""

    def __post_init__(self) -> None:
        require_positive(
            self,
            "rerank",
            "num_candidates",
            "batch_size",
            "queries_per_unit",
            "num_threads_per_actor",
            "num_actors",
            "second_direction",
            "num_loading_threads",
        )
        require_text(self, "rerank.", "store_path", "calibration")
        for name, is_set in (
            ("store_path", self.store_path is not None),
            ("store_whole_database", self.store_whole_database),
            ("stored_as", self.stored_as is not StoredAs.half),
        ):
            require(
                not is_set or self.dense_features is DenseFeatures.store,
                f"rerank.{name}={getattr(self, name)}: rerank.dense_features={self.dense_features} has no store; "
                "expected rerank.dense_features=store, too",
            )
        self._check_calibrated()
        for name in ("cache_gib", "gpu_cache_gib"):
            size_gib = getattr(self, name)
            require(0 <= size_gib < math.inf, f"rerank.{name}={size_gib}: expected 0 or more, and finite")
        numbers = self.report_candidates
        require(
            numbers is None
            or (len(numbers) > 0 and numbers == sorted({n for n in numbers if 0 < n <= self.num_candidates})),
            f"rerank.report_candidates={numbers}: expected different numbers in ascending order, "
            f"from 1 to rerank.num_candidates={self.num_candidates}",
        )
        require(
            self.second_direction is None or numbers in (None, [self.num_candidates]),
            f"rerank.report_candidates={numbers}, rerank.second_direction={self.second_direction}: a score then "
            "depends on the other candidates, and fewer can't be reported on; expected one of the two",
        )
        require_gpus(self, "rerank")

    def _check_calibrated(self) -> None:
        below = self.not_in_map_below
        require(below is None or 0 <= below <= 1, f"rerank.not_in_map_below={below}: expected a probability, 0 to 1")
        for setting, is_used in (
            ("not_in_map_below", below is not None),
            ("adaptive", self.adaptive),
            ("decision", self.decision is not DecisionRule.pair),
        ):
            require(
                not is_used or self.calibration is not None,
                f"rerank.{setting} is set without rerank.calibration: expected a file of ray_jobs.calibrate, too",
            )
        require(
            not self.adaptive or self.second_direction is None,
            f"rerank.adaptive=true, rerank.second_direction={self.second_direction}: expected one of them; a margin "
            "is calibrated on pairs scored in both directions",
        )


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """Which Ray cluster runs the job."""

    address: str | None = None
    """Scheduling: address of a running cluster; null = RAY_ADDRESS, or a Ray of its own on this machine."""
    num_cpus: int | None = None
    """Scheduling: CPUs of a Ray of its own; null = those of this machine."""

    def __post_init__(self) -> None:
        require_positive(self, "cluster", "num_cpus")


@dataclass(kw_only=True, slots=True)
class EvaluateConfig(BenchmarkJobConfig):
    """`python -m ray_jobs.evaluate`: describe, index, retrieve, re-rank, report."""

    output: str = "???"
    """Directory (path or URL) of everything that the run writes; the same line again resumes it."""
    benchmarks: list[str] = field(default_factory=list)
    """One or more benchmarks in one run, by name, each in its own folder of the output."""
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    describe: DescribeConfig = field(default_factory=DescribeConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    rerank: RerankConfig = field(default_factory=RerankConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        BenchmarkJobConfig.__post_init__(self)
        require_text(self, "", "output")


@dataclass(kw_only=True, slots=True)
class CheckBenchmarkConfig(BenchmarkJobConfig):
    """`python -m ray_jobs.check_benchmark`: is a download whole? Counts, and one line for each problem."""

    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    num_opened: int = 100
    """Database photos, and as many query photos, that are opened: a sample, the same one each time."""

    def __post_init__(self) -> None:
        BenchmarkJobConfig.__post_init__(self)
        require(self.num_opened >= 0, f"num_opened={self.num_opened}: expected 0 or more")


@dataclass(kw_only=True, slots=True)
class CalibrateConfig:
    """`python -m ray_jobs.calibrate`: from an evaluation, how sure an answer is and when re-ranking may stop."""

    predictions: str = "???"
    """Output directory (path or URL) of a finished evaluation with ground truth, which scored all pairs both ways."""
    output: str = "???"
    """File (path or URL) to write, for rerank.calibration; one that is there is replaced."""
    max_loss: float = 0.1
    """Most points of recall@1 that stopping early may lose on the queries that are fitted to."""

    def __post_init__(self) -> None:
        require_text(self, "", "predictions", "output")
        require(0 <= self.max_loss <= 100, f"max_loss={self.max_loss}: expected points of recall, 0 to 100")


@dataclass(kw_only=True)
class PositionsConfig:
    """Where the photos of an index were taken, for queries that search some places only."""

    positions: PositionSource | None = None
    """names (`@utm_east@utm_north@...`), table or exif; null = not known."""
    positions_table: str | None = None
    """CSV or Parquet (path or URL) of the photos and where each was taken; others take no part."""
    columns: PositionColumns = field(default_factory=PositionColumns)

    def __post_init__(self) -> None:
        require_text(self, "", "positions_table")
        require(
            (self.positions is PositionSource.table) == (self.positions_table is not None),
            f"positions={self.positions}, positions_table={self.positions_table}: expected positions=table and "
            "positions_table=FILE together, or neither",
        )


@dataclass(kw_only=True)
class BuildIndexConfig(PositionsConfig):
    """`python -m ray_jobs.build_index`: describe a folder of photos and index it."""

    database: str = "???"
    """Folder of database photos (path or URL), searched recursively."""
    output: str = "???"
    """Index directory to write (path or URL); the same line again resumes it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    describe: DescribeConfig = field(default_factory=DescribeConfig)
    index: BuildConfig = field(default_factory=BuildConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        PositionsConfig.__post_init__(self)
        require_text(self, "", "database", "output")


@dataclass(kw_only=True)
class ChangedIndexConfig(ShardsConfig):
    """The index that is changed. Budget, recall and lists are those of a new kind."""

    path: str = "???"
    """Index directory (path or URL) written by build_index or evaluate."""
    kind: IndexKind | None = None
    """Kind of index from now on, built anew for all photos; null = as it is."""
    compact_share: float = 0.2
    """A shard of which more than this share is removed is written anew by compact=true."""

    def __post_init__(self) -> None:
        require_text(self, "index.", "path")
        require(
            self.kind is not None or (self.num_lists is None and self.memory_budget_gib is None),
            "index.num_lists or index.memory_budget_gib is set without index.kind: expected index.kind=..., too",
        )
        require(0 <= self.compact_share < 1, f"index.compact_share={self.compact_share}: expected 0 to below 1")
        self.as_build_config()

    def as_build_config(self) -> BuildConfig:
        """How shards are built."""
        shared = {item.name: getattr(self, item.name) for item in fields(ShardsConfig)}
        return BuildConfig(kind=self.kind or IndexKind.auto, **shared)


@dataclass(kw_only=True)
class UpdateIndexConfig(PositionsConfig):
    """`python -m ray_jobs.update_index`: add photos to an index, remove some, each change a new generation."""

    add: str | None = None
    """Folder below that of the index's photos, or list of photos in it (.txt, a path a line; .csv, .parquet: path)."""
    remove: str | None = None
    """The same; photos that are removed need not exist any more."""
    compact: bool = False
    """Write shards anew, without their removed photos, of which many are removed (index.compact_share)."""
    single_writer: bool = False
    """Your word that nobody else changes the index now: needed where a store can't tell two writers apart."""
    model: ModelConfig = field(default_factory=ModelConfig)
    describe: DescribeConfig = field(default_factory=DescribeConfig)
    index: ChangedIndexConfig = field(default_factory=ChangedIndexConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        PositionsConfig.__post_init__(self)
        require_text(self, "", "add", "remove")
        require(
            self.add is not None or self.remove is not None or self.compact or self.index.kind is not None,
            "nothing to do: expected one or more of add=..., remove=..., compact=true, index.kind=...",
        )
        require(
            self.positions is not PositionSource.exif,
            "positions=exif: added photos need metres of the index's own UTM zone; expected names, or table with UTM",
        )


@dataclass(kw_only=True, slots=True)
class FilterConfig:
    """Which photos of an index a query may find; a photo whose position is not known meets no condition on it."""

    near_m: float | None = None
    """At most this far from filter.center, or from each query's own prior position."""
    center: list[float] | None = None
    """[utm_east, utm_north] of all queries' prior position, in metres."""
    priors: str | None = None
    """CSV or Parquet of each query's prior (path, utm_east, utm_north, heading); null = from `@` names, if needed."""
    box: list[float] | None = None
    """[west, south, east, north] in metres of UTM."""
    heading_deg: float | None = None
    """Direction of view, clockwise from north, of all queries; null = from each query's prior."""
    within_deg: float | None = None
    """At most this far from that direction, to either side."""

    def __post_init__(self) -> None:
        require_text(self, "filter.", "priors")
        require_positive(self, "filter", "near_m", "within_deg")
        for name, length, what in (("center", 2, "[east, north]"), ("box", 4, "[west, south, east, north]")):
            values = getattr(self, name)
            require(
                values is None or (len(values) == length and all(math.isfinite(value) for value in values)),
                f"filter.{name}={values}: expected {what} in metres",
            )
        require(
            self.box is None or (self.box[0] <= self.box[2] and self.box[1] <= self.box[3]),
            f"filter.box={self.box}: expected west <= east and south <= north",
        )
        require(self.center is None or self.near_m is not None, "filter.center is set: expected filter.near_m, too")
        require(
            self.heading_deg is None or self.within_deg is not None,
            "filter.heading_deg is set: expected filter.within_deg, too",
        )
        require(
            self.priors is None or self.needs_priors,
            "filter.priors is set, but every condition has its value for all queries; expected filter.near_m without "
            "filter.center, or filter.within_deg without filter.heading_deg",
        )

    @property
    def is_set(self) -> bool:
        """Whether there is any condition."""
        return self.near_m is not None or self.box is not None or self.within_deg is not None

    @property
    def needs_priors(self) -> bool:
        """Whether a condition is another one for each query."""
        return (self.near_m is not None and self.center is None) or (
            self.within_deg is not None and self.heading_deg is None
        )


@dataclass(kw_only=True, slots=True)
class QueryConfig:
    """`python -m ray_jobs.query`: where was each of these photos taken? Against an index that exists."""

    queries: str = "???"
    """Folder of query photos (path or URL), searched recursively."""
    output: str = "???"
    """Directory (path or URL) of the predictions; the same line again resumes it."""
    filter: FilterConfig = field(default_factory=FilterConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    describe: DescribeConfig = field(default_factory=DescribeConfig)
    index: OpenIndexConfig = field(default_factory=OpenIndexConfig)
    rerank: RerankConfig = field(default_factory=RerankConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        require_text(self, "", "queries", "output")
        require(
            self.rerank.report_candidates is None,
            f"rerank.report_candidates={self.rerank.report_candidates}: queries without ground truth are not audited; "
            "expected null",
        )


@dataclass(kw_only=True, slots=True)
class PlanSettings:
    """What is planned, and how fast the cluster is."""

    num_images: int | None = None
    """Photos of the database; null = those of benchmark=..."""
    images_per_s: float | None = None
    """Photos that the whole cluster describes in a second; null = measured on the cluster at hand."""
    calibration_photos: int | None = None
    """Photos drawn and described to measure that; null = 64, then as many as take some seconds."""
    num_queries: int | None = None
    """Queries of a run, for the cost of its dense features; null = those of benchmark=..., or not planned."""
    num_candidates: int = NUM_CANDIDATES
    """Candidates that it re-ranks for each query."""

    def __post_init__(self) -> None:
        require_positive(
            self, "plan", "num_images", "images_per_s", "calibration_photos", "num_queries", "num_candidates"
        )


@dataclass(kw_only=True, slots=True)
class PlanConfig(BenchmarkJobConfig):
    """`python -m ray_jobs.plan`: what an index of so many photos takes, before it is built: sizes, memory, hours."""

    output: str | None = None
    """File (path or URL) for the plan as JSON; on several machines the calibration's photos lie beside it meanwhile."""
    plan: PlanSettings = field(default_factory=PlanSettings)
    benchmark: BenchmarkConfig | None = None
    """A benchmark whose database photos are counted; or plan.num_images=..."""
    model: ModelConfig = field(default_factory=ModelConfig)
    describe: DescribeConfig = field(default_factory=DescribeConfig)
    index: BuildConfig = field(default_factory=BuildConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        BenchmarkJobConfig.__post_init__(self)
        require_text(self, "", "output")
        given = "both are given" if self.benchmark is not None else "neither is given"
        require(
            (self.benchmark is None) != (self.plan.num_images is None),
            f"benchmark=... and plan.num_images=...: {given}; expected one of them, the number of photos comes from it",
        )
