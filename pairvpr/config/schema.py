"""The settings of the inference jobs, as dataclasses; YAML and the command line fill them in.

Units are in the names (`_m`, `_px`, `_gib`), `num_` counts things. A field's doc line is what `--help` prints.
Settings marked *scheduling* decide where and when work runs and never change a result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

from pairvpr.config.benchmark_schema import BenchmarkConfig, BenchmarkJobConfig
from pairvpr.config.checks import require, require_positive, require_text


class Ffn(StrEnum):
    """The feed-forward network of an encoder block."""

    mlp = "mlp"
    swiglu = "swiglu"


class Precision(StrEnum):
    """Number format of the network's matrix products."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


def require_gpus(config: DescribeConfig | RerankConfig, prefix: str) -> None:
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


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The network and its weights."""

    name: str = "vitb"
    """What reports call the model."""
    image_size_px: int = 322
    """Side of the square that every photo is resized to."""
    patch_size_px: int = 14
    """Side of a patch; must divide image_size_px."""
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
        require_positive(self, "model", "image_size_px", "patch_size_px", "descriptor_dim")
        for name, size_px in (
            ("image_size_px", self.image_size_px),
            ("encoder.pretrain_image_size_px", self.encoder.pretrain_image_size_px),
        ):
            require(
                size_px % self.patch_size_px == 0,
                f"model.{name}={size_px}: expected a multiple of model.patch_size_px={self.patch_size_px}",
            )

    @property
    def num_patches(self) -> int:
        """L, the number of patches of an image."""
        return (self.image_size_px // self.patch_size_px) ** 2


@dataclass(kw_only=True, slots=True)
class DescribeConfig:
    """Photos -> global descriptors, with Ray Data."""

    batch_size: int = 16
    """Photos in one forward pass; cut from the manifest by position, so it decides rounding."""
    num_threads_per_actor: int = 2
    """CPU threads of the network in one actor; decides rounding."""
    num_actors: int | None = None
    """Scheduling: model actors; null = one for each GPU, or one for every two CPUs."""
    num_gpus_per_actor: float | None = None
    """GPUs of one actor, 0 = its CPU threads; null = 1 where the cluster has GPUs. A GPU rounds unlike a CPU."""
    memory_gib: float = 1.0
    """Scheduling: object-store memory for decoded photos in flight, whatever the number of photos."""

    def __post_init__(self) -> None:
        require_positive(self, "describe", "batch_size", "num_threads_per_actor", "num_actors", "memory_gib")
        require_gpus(self, "describe")


@dataclass(kw_only=True, slots=True)
class SearchConfig:
    """Descriptors of queries -> candidates, from the shards of an index."""

    num_retrieved: int = 1000
    """Candidates kept for each query, if that is more than rerank.num_candidates."""
    num_threads_per_actor: int = 2
    """CPU threads of faiss in one shard actor."""
    num_actors: int | None = None
    """Scheduling: shard actors; null = one for each shard, at most one for every two CPUs."""

    def __post_init__(self) -> None:
        require_positive(self, "index", "num_retrieved", "num_threads_per_actor", "num_actors")


@dataclass(kw_only=True, slots=True)
class IndexConfig(SearchConfig):
    """The index of an evaluation: built where it is missing, reused where it is finished."""

    path: str | None = None
    """Index directory (path or URL), which runs may share, one after another until it is finished; null = OUT/index."""
    num_shards: int | None = None
    """Contiguous shards of the database; null = one for every 250,000 photos."""

    def __post_init__(self) -> None:
        SearchConfig.__post_init__(self)
        require_text(self, "index.", "path")
        require_positive(self, "index", "num_shards")


@dataclass(kw_only=True, slots=True)
class BuildConfig:
    """How an index is cut."""

    num_shards: int | None = None
    """Contiguous shards of the database; null = one for every 250,000 photos."""

    def __post_init__(self) -> None:
        require_positive(self, "index", "num_shards")


@dataclass(kw_only=True, slots=True)
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

    num_candidates: int = 100
    """Candidates K re-ranked for each query (at most the number of database photos)."""
    batch_size: int = 16
    """Pairs in one forward pass, cut from a query's candidates in retrieval order; decides rounding."""
    queries_per_unit: int = 4
    """Queries of one work unit: what a dying actor loses."""
    num_threads_per_actor: int = 2
    """CPU threads of the network in one actor; decides rounding."""
    num_actors: int | None = None
    """Scheduling: re-ranking actors; null = one for each GPU, or one for every two CPUs."""
    num_gpus_per_actor: float | None = None
    """GPUs of one actor, 0 = its CPU threads; null = 1 where the cluster has GPUs. A GPU rounds unlike a CPU."""
    cache_gib: float = 0.5
    """Scheduling: dense features that an actor keeps from unit to unit, 0 = none."""
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
        )
        require(0 <= self.cache_gib < math.inf, f"rerank.cache_gib={self.cache_gib}: expected 0 or more, and finite")
        numbers = self.report_candidates
        require(
            numbers is None
            or (len(numbers) > 0 and numbers == sorted({n for n in numbers if 0 < n <= self.num_candidates})),
            f"rerank.report_candidates={numbers}: expected different numbers in ascending order, "
            f"from 1 to rerank.num_candidates={self.num_candidates}",
        )
        require_gpus(self, "rerank")


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
class BuildIndexConfig:
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
        require_text(self, "", "database", "output")


@dataclass(kw_only=True, slots=True)
class QueryConfig:
    """`python -m ray_jobs.query`: where was each of these photos taken? Against an index that exists."""

    queries: str = "???"
    """Folder of query photos (path or URL), searched recursively."""
    output: str = "???"
    """Directory (path or URL) of the predictions; the same line again resumes it."""
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
