"""The settings of the inference jobs, as dataclasses; YAML and the command line fill them in.

Units are in the names (`_m`, `_px`, `_gib`), `num_` counts things. `--help-all` prints each field's doc line.
Settings marked *scheduling* decide where and when work runs and never change a result.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any

from pairvpr.config.benchmark_schema import BenchmarkConfig, BenchmarkJobConfig, PositionColumns, PositionSource
from pairvpr.config.checks import require, require_not_negative, require_positive, require_text

NUM_CANDIDATES = 100
"""Default number K of candidates to re-rank for each query."""
EVALUATED_CANDIDATES = 1000
"""Default number of candidates to keep for each query of an evaluation."""


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
    """How an index stores its descriptors for search (docs/index.md)."""

    auto = "auto"
    flat = "flat"
    flat_fp16 = "flat_fp16"
    flat_8bit = "flat_8bit"
    ivf_fp16 = "ivf_fp16"
    ivf_8bit = "ivf_8bit"
    ivf_rabitq = "ivf_rabitq"


class DenseFeatures(StrEnum):
    """Where re-ranking gets the dense features of database photos."""

    recompute = "recompute"
    cache = "cache"
    store = "store"


class DecisionRule(StrEnum):
    """How re-ranked candidates are ordered."""

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
        f"{prefix}.num_gpus_per_actor={number}: expected 0 or more, and a whole number above 1",
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
    """Image side for which the position embeddings were trained."""
    pos_embed_antialias: bool = True
    """Resize the position embeddings with anti-aliasing (true for models with registers)."""
    pos_embed_offset: float = 0.0
    """Added to the grid size in the scale factor (0.1 for models without registers); 0 = resize to the exact size."""
    num_trainable_blocks: int = 6
    """Train only this many of the last blocks; earlier blocks stay frozen."""

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


MAX_MEGAPIXELS = 178.0
"""Default of `model.max_megapixels`: allows panoramas of 16,384 x 8,192 and somewhat more."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The network and its weights."""

    name: str = "vitb"
    """Name of the model in reports."""
    image_size_px: int = 322
    """Every photo is resized to a square of this side."""
    patch_size_px: int = 14
    """Side of a patch; must divide image_size_px."""
    scaled_decoding: bool = False
    """Decode large JPEGs at 1/2, 1/4 or 1/8 (sides >= 2 x image_size_px): faster, changes descriptors slightly."""
    max_megapixels: float = MAX_MEGAPIXELS
    """Photos of more pixels are rejected before they are decoded: memory grows with them."""
    descriptor_dim: int = 512
    """Width G of the global descriptor."""
    weights: str | None = None
    """Path or URL (s3://, hf://, ...) of a .pth or .safetensors state dict; null = untrained, seeded."""
    precision: Precision = Precision.fp32
    """fp32 (exact), bf16 or fp16."""
    compile: bool = False
    """Run the network as torch.compile makes it: fewer kernels, minutes at the start, other roundings."""
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

        `scaled_decoding`, `compile` and `max_megapixels` are there only when they are set: what was made before there
        were such settings is like what is made without them.
        """
        values = asdict(self)
        del values["weights"], values["encoder"]["num_trainable_blocks"]
        for name in ("scaled_decoding", "compile"):
            if not values[name]:
                del values[name]
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
    """Photos per forward pass, batched in manifest order; affects rounding."""
    num_threads_per_actor: int = 2
    """CPU threads of the network per actor; affects rounding."""

    def __post_init__(self) -> None:
        require_positive(self, "describe", "batch_size", "num_threads_per_actor")


@dataclass(kw_only=True)
class DescribeConfig(DescribePassConfig):
    """Photos -> global descriptors, with Ray Data."""

    num_actors: int | None = None
    """Scheduling: number of model actors; null = one per GPU, or one per two CPUs without GPUs."""
    num_gpus_per_actor: float | None = None
    """GPUs per actor; 0 = run on the CPU; null = 1 if the cluster has GPUs. GPUs and CPUs round differently."""
    memory_gib: float = 1.0
    """Scheduling: limit on object-store memory for decoded photos waiting for the network."""
    descriptors: str | None = None
    """File (path or URL) of your own descriptors, .npy with a list of paths or Parquet: no network describes photos."""

    def __post_init__(self) -> None:
        DescribePassConfig.__post_init__(self)
        require_text(self, "describe.", "descriptors")
        require_positive(self, "describe", "num_actors", "memory_gib")
        require_gpus(self, "describe")


@dataclass(kw_only=True)
class DescribeBothConfig(DescribeConfig):
    """Database and queries -> global descriptors, with Ray Data."""

    query_descriptors: str | None = None
    """With describe.descriptors: the file of the queries' descriptors; null = describe.descriptors has them, too."""

    def __post_init__(self) -> None:
        DescribeConfig.__post_init__(self)
        require_text(self, "describe.", "query_descriptors")
        require(
            self.query_descriptors is None or self.descriptors is not None,
            f"describe.query_descriptors={self.query_descriptors}: expected describe.descriptors, too",
        )


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of red, green and blue on a scale of 0 to 1."""


@dataclass(kw_only=True)
class DescriptorConfig:
    """A network of your own that describes photos in place of Pair-VPR's (docs/first_stages.md)."""

    module: str | None = None
    """package.module:function of your environment; it returns a torch.nn.Module (B, 3, S, S) -> (B, G). null = none."""
    image_size_px: int = 322
    """S: every photo is resized to a square of this side."""
    mean: list[float] = field(default_factory=lambda: list(IMAGENET_MEAN))
    """Subtracted from red, green and blue on a scale of 0 to 1."""
    std: list[float] = field(default_factory=lambda: list(IMAGENET_STD))
    """What red, green and blue are then divided by."""

    def __post_init__(self) -> None:
        require_text(self, "descriptor.", "module")
        require_positive(self, "descriptor", "image_size_px")
        for name, lowest, what in (("mean", -math.inf, "finite numbers"), ("std", 0.0, "finite numbers above 0")):
            values = getattr(self, name)
            require(
                len(values) == 3 and all(lowest < value < math.inf for value in values),
                f"descriptor.{name}={values}: expected three {what}, of red, green and blue",
            )
        for name in ("image_size_px", "mean", "std") if self.module is None else ():
            default = getattr(DescriptorConfig(module="a:b"), name)
            require(
                getattr(self, name) == default,
                f"descriptor.{name}={getattr(self, name)}: expected descriptor.module, too, whose photos it is about",
            )


@dataclass(kw_only=True)
class SearchConfig:
    """Query descriptors -> candidates, found in the shards of an index."""

    num_retrieved: int | None = None
    """Candidates to keep per query, if more than rerank.num_candidates; null = 1,000 in evaluate, else no more."""
    num_probes: int | None = None
    """Lists to scan per query in an ivf_* index; null = the number measured to reach the index's target recall."""
    num_threads_per_actor: int = 2
    """CPU threads of faiss per shard actor."""
    num_actors: int | None = None
    """Scheduling: number of shard actors; null = one per shard (ivf_rabitq: per group), at most one per two CPUs."""
    num_gpus_per_actor: float = 0.0
    """Scheduling: GPUs per shard actor, used to shortlist candidates in a flat index; needs faiss-gpu."""
    memory_map: bool = False
    """Scheduling: memory-map shard files instead of loading them (grouped ivf_rabitq shards are always loaded)."""
    cache_dir: str | None = None
    """Scheduling: local cache folder for shards of a remote index; null = pairvpr-cache in the temporary folder."""
    cache_gib: float = 20.0
    """Scheduling: size limit of that cache; the least recently used files are deleted. One shard always fits."""

    def __post_init__(self) -> None:
        require_text(self, "index.", "cache_dir")
        require_positive(
            self, "index", "num_retrieved", "num_probes", "num_threads_per_actor", "num_actors", "cache_gib"
        )
        require_gpus(self, "index")

    def num_kept(self, num_candidates: int) -> int:
        """Candidates to keep for each query; the first `num_candidates` of them are re-ranked."""
        return max(num_candidates, self.num_retrieved or 0)

    def settings(self) -> dict[str, Any]:
        """The settings that affect which candidates are found, as plain values."""
        return {
            "num_retrieved": self.num_retrieved,
            "num_probes": self.num_probes,
            "num_threads_per_actor": self.num_threads_per_actor,
        }


@dataclass(kw_only=True)
class ShardsConfig:
    """How the shards of an index are built."""

    num_shards: int | None = None
    """Number of contiguous shards for the described photos; null = one per 250,000 photos."""
    memory_budget_gib: float | None = None
    """Memory limit for all shards together during search; null = half of the cluster's memory."""
    target_recall: float = 0.95
    """For ivf_* kinds: target recall of the exact 100 nearest neighbours, measured after the build."""
    num_lists: int | None = None
    """Number of lists of an ivf_* index; null = chosen from the number of photos."""
    num_build_threads: int = 2
    """CPU threads used to train the index and build each shard; affects rounding of ivf_* kinds."""
    allow_overcommit: bool = False
    """Scheduling: build the index even if it exceeds the cluster's memory or disk."""

    def __post_init__(self) -> None:
        require_positive(self, "index", "num_shards", "memory_budget_gib", "num_lists", "num_build_threads")
        require(0 < self.target_recall <= 1, f"index.target_recall={self.target_recall}: expected above 0, at most 1")


@dataclass(kw_only=True)
class BuildConfig(ShardsConfig):
    """The kind of an index and how it is sharded."""

    kind: IndexKind = IndexKind.auto
    """flat, flat_fp16, flat_8bit (exact), ivf_fp16, ivf_8bit, ivf_rabitq (approximate); auto = by memory and recall."""
    reduce_to: int | None = None
    """Reduce descriptors to this many values by PCA with whitening, learnt from a sample; null = as they are."""

    def __post_init__(self) -> None:
        ShardsConfig.__post_init__(self)
        require_positive(self, "index", "reduce_to")
        require(
            self.num_lists is None or self.kind in (IndexKind.auto, *IVF_KINDS),
            f"index.num_lists={self.num_lists}: index.kind={self.kind} has no lists; expected one of "
            f"{', '.join(IVF_KINDS)}, or null",
        )


IVF_KINDS = (IndexKind.ivf_fp16, IndexKind.ivf_8bit, IndexKind.ivf_rabitq)


@dataclass(kw_only=True)
class IndexConfig(SearchConfig, BuildConfig):
    """The index of an evaluation: built if it is missing or incomplete, otherwise reused."""

    path: str | None = None
    """Index directory (path or URL); null = OUT/index. Runs may share an index; only one at a time may build it."""

    def __post_init__(self) -> None:
        SearchConfig.__post_init__(self)
        BuildConfig.__post_init__(self)
        require_text(self, "index.", "path")

    def num_kept(self, num_candidates: int) -> int:
        """As in `SearchConfig`; by default an evaluation keeps enough candidates for its recall@N curves."""
        return max(num_candidates, self.num_retrieved or EVALUATED_CANDIDATES)

    def settings(self) -> dict[str, Any]:
        """The settings that affect which candidates are found, as plain values."""
        built = ("kind", "memory_budget_gib", "target_recall", "num_lists", "num_build_threads")
        return {
            **super().settings(),
            "num_retrieved": self.num_retrieved or EVALUATED_CANDIDATES,
            **{name: getattr(self, name) for name in built},
        }


@dataclass(kw_only=True)
class OpenIndexConfig(SearchConfig):
    """An existing index."""

    path: str = "???"
    """Index directory (path or URL) written by build_index or evaluate."""

    def __post_init__(self) -> None:
        SearchConfig.__post_init__(self)
        require_text(self, "index.", "path")


@dataclass(kw_only=True, slots=True)
class RerankConfig:
    """Candidates -> pair scores, in a pool of Ray actors."""

    num_candidates: int = NUM_CANDIDATES
    """Number K of candidates to re-rank per query (at most the number of database photos); 0 = retrieval alone."""
    candidates: str | None = None
    """File (path or URL) of pairs (query database [score] a line as in hloc, or Parquet): they replace retrieval."""
    batch_size: int = 16
    """Pairs per forward pass: a few candidates with all queries of the unit that have them. Affects rounding."""
    queries_per_unit: int = 8
    """Queries per work unit; they share candidates. A dying actor loses one unit. Affects rounding."""
    num_threads_per_actor: int = 2
    """CPU threads of the network per actor; affects rounding."""
    num_actors: int | None = None
    """Scheduling: number of re-ranking actors; null = one per GPU, or one per two CPUs without GPUs."""
    num_gpus_per_actor: float | None = None
    """GPUs per actor; 0 = run on the CPU; null = 1 if the cluster has GPUs. GPUs and CPUs round differently."""
    dense_features: DenseFeatures = DenseFeatures.cache
    """Scheduling: recompute in every unit, cache the most recently used, or store those of all candidates first."""
    cache_gib: float = 0.5
    """Scheduling: with dense_features=cache: memory per actor for dense features kept between units."""
    gpu_cache_gib: float = 2.0
    """Scheduling: with dense_features=cache: GPU memory per actor for the same; evicted features move to CPU memory."""
    stored_as: StoredAs = StoredAs.half
    """With dense_features=store: half = 16 bits per value; int8 = 8 bits and a scale per patch."""
    store_path: str | None = None
    """Scheduling: with dense_features=store: directory (path or URL) of the store; null = OUT/dense."""
    store_whole_database: bool = False
    """Scheduling: with dense_features=store: store all database photos, so that other runs can use the store."""
    num_loading_threads: int = 1
    """Scheduling: threads per actor that load photos or stored features ahead of the network."""
    second_direction: int | None = None
    """Also score (candidate, query) for this many candidates of best logit(query, candidate); null = all."""
    calibration: str | None = None
    """File (path or URL) from pairvpr calibrate; adds a confidence (probability of being right) to each answer."""
    not_in_map_below: float | None = None
    """Answer "not in this map" (in_map) if the confidence is below this; needs rerank.calibration."""
    adaptive: bool = False
    """Score candidates in batches; stop once the best one leads by the margin in rerank.calibration."""
    decision: DecisionRule = DecisionRule.pair
    """Order answers by: pair = pair score (as published); fused = also distance; consensus = also neighbours."""
    report_candidates: list[int] | None = None
    """Ascending numbers of candidates for which the audit reports recall; null = 10, 20, 50, ... and K."""

    def __post_init__(self) -> None:
        require_positive(
            self,
            "rerank",
            "batch_size",
            "queries_per_unit",
            "num_threads_per_actor",
            "num_actors",
            "second_direction",
            "num_loading_threads",
        )
        require_text(self, "rerank.", "candidates", "store_path", "calibration")
        require(
            self.num_candidates >= 0,
            f"rerank.num_candidates={self.num_candidates}: expected 0 (retrieval alone) or more",
        )
        for name, is_set in (
            ("candidates", self.candidates is not None),
            ("calibration", self.calibration is not None),
            ("dense_features", self.dense_features is DenseFeatures.store),
            ("report_candidates", self.report_candidates is not None),
        ):
            require(
                not is_set or self.num_candidates > 0,
                f"rerank.{name}={getattr(self, name)}: rerank.num_candidates=0 scores no pair; expected 1 or more",
            )
        require(
            self.candidates is None or self.decision is DecisionRule.pair,
            f"rerank.decision={self.decision}, rerank.candidates={self.candidates}: nobody knows the distances of "
            "given candidates, and the decision needs them; expected one of the two",
        )
        for name, is_set in (
            ("store_path", self.store_path is not None),
            ("store_whole_database", self.store_whole_database),
            ("stored_as", self.stored_as is not StoredAs.half),
        ):
            require(
                not is_set or self.dense_features is DenseFeatures.store,
                f"rerank.{name}={getattr(self, name)}: rerank.dense_features={self.dense_features} has no store; "
                "expected also rerank.dense_features=store",
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
            "depends on the other candidates, so fewer can't be reported; expected one of the two",
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
                f"rerank.{setting} is set without rerank.calibration: expected also a file from pairvpr calibrate",
            )
        require(
            not self.adaptive or self.second_direction is None,
            f"rerank.adaptive=true, rerank.second_direction={self.second_direction}: expected one of them, because a "
            "margin "
            "is calibrated on pairs scored in both directions",
        )


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """Which Ray cluster runs the job."""

    address: str | None = None
    """Scheduling: address of a running cluster; null = RAY_ADDRESS, or a new local Ray instance."""
    num_cpus: int | None = None
    """Scheduling: CPUs of a new local Ray instance, or this job's share of a running cluster's; null = all."""

    def __post_init__(self) -> None:
        require_positive(self, "cluster", "num_cpus")


@dataclass(kw_only=True, slots=True)
class EvaluateConfig(BenchmarkJobConfig):
    """`pairvpr evaluate`: describe, index, retrieve, re-rank, report."""

    output: str = "???"
    """Output directory (path or URL) of the run; run the same command again to resume."""
    benchmarks: list[str] = field(default_factory=list)
    """Names of one or more benchmarks to run; each gets its own folder in the output."""
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    describe: DescribeBothConfig = field(default_factory=DescribeBothConfig)
    descriptor: DescriptorConfig = field(default_factory=DescriptorConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    rerank: RerankConfig = field(default_factory=RerankConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        BenchmarkJobConfig.__post_init__(self)
        require_text(self, "", "output")


@dataclass(kw_only=True, slots=True)
class CheckBenchmarkConfig(BenchmarkJobConfig):
    """`pairvpr check_benchmark`: is a download complete? Prints counts, and one line per problem."""

    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    num_opened: int = 100
    """Number of database photos, and of query photos, to open: a fixed sample."""
    max_megapixels: float = MAX_MEGAPIXELS
    """Photos of more pixels are problems, as they are for a run with this model.max_megapixels."""

    def __post_init__(self) -> None:
        BenchmarkJobConfig.__post_init__(self)
        require(self.num_opened >= 0, f"num_opened={self.num_opened}: expected 0 or more")
        require(self.max_megapixels > 0, f"max_megapixels={self.max_megapixels:g}: expected a number above 0")


@dataclass(kw_only=True, slots=True)
class CalibrateConfig:
    """`pairvpr calibrate`: fit confidences and the rule for early stopping to an evaluation."""

    predictions: str = "???"
    """Output directory (path or URL) of a finished evaluation with ground truth and all pairs scored both ways."""
    output: str = "???"
    """File (path or URL) to write, for use as rerank.calibration; an existing file is replaced."""
    max_loss: float = 0.1
    """Percentage points of recall@1 that early stopping may lose on the queries used for fitting."""

    def __post_init__(self) -> None:
        require_text(self, "", "predictions", "output")
        require(0 <= self.max_loss <= 100, f"max_loss={self.max_loss}: expected points of recall, 0 to 100")


@dataclass(kw_only=True)
class ReportSettings:
    """What a report shows."""

    pictures: int = 200
    """Number of queries to picture, failures first; a page of 200 stays below 10 MB."""
    explain: int = 0
    """Number of pictured pairs to show the pair decoder's attention for; computed here, with the run's weights."""
    weights: str | None = None
    """With report.explain: path or URL of the run's weights; null = those published for its network."""
    tiles: str | None = None
    """Address of background map tiles with {z}, {x}, {y}; readers' browsers ask it. null = no request of any kind."""
    utm_epsg: int | None = None
    """With report.tiles: EPSG code of the positions' UTM zone; null = as the photos' names state it."""

    def __post_init__(self) -> None:
        require_text(self, "report.", "weights", "tiles")
        require_positive(self, "report", "pictures")
        require(self.explain >= 0, f"report.explain={self.explain}: expected 0 or more")
        require(
            self.tiles is None
            or (self.tiles.startswith(("https://", "http://")) and all(f"{{{axis}}}" in self.tiles for axis in "zxy")),
            f"report.tiles={self.tiles}: expected an address such as https://HOST/{{z}}/{{x}}/{{y}}.png",
        )


@dataclass(kw_only=True)
class ReportConfig:
    """`pairvpr report OUT`: one HTML file that shows a finished run, opened without a network."""

    run: str = "???"
    """Output directory (path or URL) of a finished run of evaluate or query."""
    output: str | None = None
    """HTML file (path or URL) to write, replacing an existing one; null = report.html in the run's directory."""
    report: ReportSettings = field(default_factory=ReportSettings)

    def __post_init__(self) -> None:
        require_text(self, "", "run", "output")


@dataclass(kw_only=True)
class PositionsConfig:
    """Where the photos of an index were taken; needed to search only some places."""

    positions: PositionSource | None = None
    """Source of positions: names (`@utm_east@utm_north@...`), table or exif; null = unknown positions."""
    positions_table: str | None = None
    """CSV or Parquet (path or URL) of the photos and their positions; photos not listed are ignored."""
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
    """`pairvpr build_index`: describe a folder of photos and index it."""

    database: str = "???"
    """Folder of database photos (path or URL), searched recursively."""
    output: str = "???"
    """Index directory to write (path or URL); run the same command again to resume."""
    model: ModelConfig = field(default_factory=ModelConfig)
    describe: DescribeConfig = field(default_factory=DescribeConfig)
    descriptor: DescriptorConfig = field(default_factory=DescriptorConfig)
    index: BuildConfig = field(default_factory=BuildConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        PositionsConfig.__post_init__(self)
        require_text(self, "", "database", "output")


OF_A_NEW_KIND = ("num_lists", "memory_budget_gib", "target_recall", "allow_overcommit")


@dataclass(kw_only=True)
class ChangedIndexConfig(ShardsConfig):
    """The index to change. Memory budget, recall, lists and overcommitment need index.kind, num_shards needs add."""

    path: str = "???"
    """Index directory (path or URL) written by build_index or evaluate."""
    kind: IndexKind | None = None
    """Rebuild the index of all photos as this kind; null = keep its kind."""
    compact_share: float = 0.2
    """compact=true rewrites shards of which more than this fraction has been removed."""

    def __post_init__(self) -> None:
        require_text(self, "index.", "path")
        require(0 <= self.compact_share < 1, f"index.compact_share={self.compact_share}: expected 0 to below 1")
        self.as_build_config()
        self._check_acts(OF_A_NEW_KIND, "index.kind=...", acts=self.kind is not None)

    def check_acts(self, *, adds: bool, compacts: bool) -> None:
        """Raise `UserError` for a setting that changes nothing in an update that `adds` photos or `compacts`."""
        self._check_acts(("num_shards",), "add=...", acts=adds)
        self._check_acts(("compact_share",), "compact=true", acts=compacts)
        builds = adds or compacts or self.kind is not None
        self._check_acts(("num_build_threads",), "add=..., compact=true or index.kind=...", acts=builds)

    def _check_acts(self, names: tuple[str, ...], expected: str, *, acts: bool) -> None:
        """Settings that differ from their defaults must act."""
        defaults = {item.name: item.default for item in fields(self)}
        for name in names if not acts else ():
            value = getattr(self, name)
            require(
                value == defaults[name],
                f"index.{name}={value}: nothing in this update reads it; expected {expected}, too",
            )

    def as_build_config(self) -> BuildConfig:
        """The same settings as a `BuildConfig`."""
        shared = {item.name: getattr(self, item.name) for item in fields(ShardsConfig)}
        return BuildConfig(kind=self.kind or IndexKind.auto, **shared)


@dataclass(kw_only=True)
class UpdateIndexConfig(PositionsConfig):
    """`pairvpr update_index`: add or remove photos of an index; each change is a new generation."""

    add: str | None = None
    """Subfolder of the index's photos, or a list of photos in it (.txt: one per line; .csv, .parquet: column path)."""
    remove: str | None = None
    """Photos to remove, given in the same way; they need not exist any more."""
    without_positions: bool = False
    """Add photos of unknown positions to an index with positions; no filter on positions finds them then."""
    compact: bool = False
    """Rewrite shards with many removed photos (more than index.compact_share) without them."""
    single_writer: bool = False
    """Confirm that nobody else is changing the index; needed on stores without atomic creation of files."""
    model: ModelConfig = field(default_factory=ModelConfig)
    describe: DescribeConfig = field(default_factory=DescribeConfig)
    descriptor: DescriptorConfig = field(default_factory=DescriptorConfig)
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
            not self.without_positions or (self.add is not None and self.positions is None),
            f"without_positions=true, add={self.add}, positions={self.positions}: expected it with add=... and without "
            "positions=...",
        )
        self.index.check_acts(adds=self.add is not None, compacts=self.compact)


@dataclass(kw_only=True, slots=True)
class FilterConfig:
    """Which photos of an index a query may find. Photos with an unknown position match no condition on it."""

    near_m: float | None = None
    """Search at most this far from filter.center, or from each query's prior position if there is no center."""
    center: list[float] | None = None
    """[utm_east, utm_north] in metres: the prior position of all queries."""
    priors: str | None = None
    """CSV or Parquet of priors: path, utm_east, utm_north (or latitude, longitude), heading; null = from `@` names."""
    box: list[float] | None = None
    """[west, south, east, north] in UTM metres: search only this box."""
    heading_deg: float | None = None
    """Viewing direction of all queries, clockwise from north; null = from each query's prior."""
    within_deg: float | None = None
    """Search photos whose direction differs by at most this, to either side."""

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
        require(self.center is None or self.near_m is not None, "filter.center is set: expected also filter.near_m")
        require(
            self.heading_deg is None or self.within_deg is not None,
            "filter.heading_deg is set: expected also filter.within_deg",
        )
        require(
            self.priors is None or self.needs_priors,
            "filter.priors is set, but every condition already has a value for all queries; expected filter.near_m "
            "without "
            "filter.center, or filter.within_deg without filter.heading_deg",
        )

    @property
    def is_set(self) -> bool:
        """Whether any condition is set."""
        return self.near_m is not None or self.box is not None or self.within_deg is not None

    @property
    def needs_priors(self) -> bool:
        """Whether a condition needs a prior for each query."""
        return (self.near_m is not None and self.center is None) or (
            self.within_deg is not None and self.heading_deg is None
        )


@dataclass(kw_only=True, slots=True)
class QueryConfig:
    """`pairvpr query`: where was each of these photos taken? Searches an existing index."""

    queries: str = "???"
    """Folder of query photos (path or URL), searched recursively."""
    output: str = "???"
    """Output directory (path or URL) of the predictions; run the same command again to resume."""
    filter: FilterConfig = field(default_factory=FilterConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    describe: DescribeConfig = field(default_factory=DescribeConfig)
    descriptor: DescriptorConfig = field(default_factory=DescriptorConfig)
    index: OpenIndexConfig = field(default_factory=OpenIndexConfig)
    rerank: RerankConfig = field(default_factory=RerankConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        require_text(self, "", "queries", "output")
        require(
            self.rerank.candidates is None or not self.filter.is_set,
            f"rerank.candidates={self.rerank.candidates}: what is given is not searched for, and filter.* says where "
            "to search; expected one of the two",
        )
        require(
            self.rerank.report_candidates is None,
            f"rerank.report_candidates={self.rerank.report_candidates}: queries without ground truth are not audited; "
            "expected null",
        )


COST_SETTINGS = ("pairs_per_s", "photo_kib", "price_per_gib_read", "price_per_gib_month")
MACHINE_SETTINGS = ("num_machines", "cpus_per_machine")


@dataclass(kw_only=True, slots=True)
class PlanSettings:
    """The size of the planned index, the speed of the cluster, and what machines and storage cost."""

    num_images: int | None = None
    """Number of database photos; null = counted in benchmark=..."""
    images_per_s: float | None = None
    """Photos per second that the whole cluster describes; null = measured on the current cluster (docs/index.md)."""
    calibration_photos: int | None = None
    """Number of synthetic photos for that measurement; null = 64, then enough to take a few seconds."""
    num_queries: int | None = None
    """Number of queries, to plan dense features; null = counted in benchmark=..., or not planned without one."""
    num_candidates: int = NUM_CANDIDATES
    """Candidates to re-rank per query."""
    price_per_hour: float | None = None
    """Dollars that a machine costs an hour: adds hours and dollars by step; null = no costs are planned."""
    num_machines: int | None = None
    """Machines that describe plan.images_per_s; null = those that are there, or 1 where no Ray is started."""
    cpus_per_machine: int | None = None
    """CPUs of each; null = those that are there, or this machine's."""
    pairs_per_s: float | None = None
    """Pairs of photos per second that the whole cluster scores; null = unknown, and left out of the costs."""
    photo_kib: float = 100.0
    """Mean size of a photo's file, to plan what is read from the store."""
    price_per_gib_read: float = 0.0
    """Dollars for a GiB read from the store (egress); 0 = machines and store are in one region."""
    price_per_gib_month: float = 0.023
    """Dollars for a GiB kept for a month; the default is S3's first price in us-east-1."""

    def __post_init__(self) -> None:
        require_positive(
            self,
            "plan",
            "num_images",
            "images_per_s",
            "calibration_photos",
            "num_queries",
            "num_candidates",
        )
        require_positive(self, "plan", "num_machines", "cpus_per_machine", "pairs_per_s", "photo_kib")
        require_not_negative(self, "plan", "price_per_hour", "price_per_gib_read", "price_per_gib_month")
        for name in (*COST_SETTINGS, *MACHINE_SETTINGS) if self.price_per_hour is None else ():
            require(
                not self.is_set(name),
                f"plan.{name}={getattr(self, name)} counts in costs only; expected plan.price_per_hour=..., too",
            )

    def is_set(self, name: str) -> bool:
        """Whether a setting differs from its default."""
        return getattr(self, name) != next(item.default for item in fields(self) if item.name == name)


@dataclass(kw_only=True, slots=True)
class PlanConfig(BenchmarkJobConfig):
    """`pairvpr plan`: estimate the size, memory and hours of an index before building it."""

    output: str | None = None
    """File (path or URL) for the plan as JSON; on several machines, temporary calibration photos are put next to it."""
    plan: PlanSettings = field(default_factory=PlanSettings)
    benchmark: BenchmarkConfig | None = None
    """Benchmark whose database photos are counted; alternatively set plan.num_images=..."""
    model: ModelConfig = field(default_factory=ModelConfig)
    describe: DescribeConfig = field(default_factory=DescribeConfig)
    descriptor: DescriptorConfig = field(default_factory=DescriptorConfig)
    index: BuildConfig = field(default_factory=BuildConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        BenchmarkJobConfig.__post_init__(self)
        require_text(self, "", "output")
        given = "both are given" if self.benchmark is not None else "neither is given"
        require(
            (self.benchmark is None) != (self.plan.num_images is None),
            f"benchmark=... and plan.num_images=...: {given}; expected one of them, to give the number of photos",
        )
        self._check_speed()
        of_queries = ["num_candidates", "pairs_per_s"]
        if self.describe.descriptors is not None:
            of_queries.append("images_per_s")
        for name in of_queries if self.benchmark is None and self.plan.num_queries is None else ():
            require(
                not self.plan.is_set(name),
                f"plan.{name}={getattr(self.plan, name)} counts for queries only; expected plan.num_queries=..., too",
            )

    def _check_speed(self) -> None:
        """A speed and machines belong together: both are given, or both are those of the cluster at hand."""
        asked, has_rows = self.plan, self.describe.descriptors is not None
        is_measured = asked.images_per_s is None and not has_rows
        require(
            asked.calibration_photos is None or is_measured,
            f"plan.calibration_photos={asked.calibration_photos}: nothing is measured with "
            f"{'describe.descriptors' if has_rows else 'plan.images_per_s'}=...; expected one of the two",
        )
        for name in MACHINE_SETTINGS if asked.price_per_hour is not None else ():
            value = getattr(asked, name)
            require(
                value is None or not is_measured,
                f"plan.{name}={value}: without plan.images_per_s=... the speed is that of the cluster at hand, and "
                "so are its machines; expected both or neither",
            )
            require(
                value is not None or asked.images_per_s is None,
                f"plan.images_per_s={asked.images_per_s}: of how many machines and CPUs is not known, so neither are "
                f"costs; expected plan.{name}=..., too",
            )
