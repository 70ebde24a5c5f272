"""The settings of training, checkpoint search and export. The published recipes are `configs/train/`."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from pairvpr.config.benchmark_schema import BenchmarkConfig, BenchmarkJobConfig
from pairvpr.config.checks import require, require_positive, require_text
from pairvpr.config.schema import (
    MAX_MEGAPIXELS,
    ClusterConfig,
    DenseFeatures,
    DescribePassConfig,
    ModelConfig,
    RerankConfig,
)


class TrainingSetName(StrEnum):
    """A training set, read in the layout of its download."""

    sfxl = "sfxl"
    gsv_cities = "gsv_cities"
    gldv2 = "gldv2"


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Settings of both stages."""

    root: str = "???"
    """Folder (path or URL) that contains the training sets sf_xl/, gsv_cities/ and gldv2/."""
    start: str | None = None
    """Initial weights (path or URL); null = random, from the seed."""
    seed: int = 0
    """Seed of all random draws: places, views, crops, masks, new weights."""
    epochs: int = 10
    """Passes over the places."""
    max_steps: int | None = None
    """Stop after this many steps; null = after all epochs. Schedules don't change."""
    global_batch_size: int = 64
    """Samples per step over all workers; each worker takes an equal share."""
    clip_grad: float | None = None
    """Clip gradients to this norm; null = no clipping."""
    train_everything: bool = False
    """Also train the encoder's embedding, tokens and earlier blocks, for training from scratch."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time, identical results."""
    keep_every_epochs: int = 1
    """Keep a permanent checkpoint every this many epochs."""
    checkpoint_every_steps: int | None = None
    """Also write the rolling checkpoint every this many steps; null = only at the end of each epoch."""
    log_every_steps: int = 10
    """Steps between two rows of metrics.jsonl."""
    validation: BenchmarkConfig | None = None
    """Benchmark whose recall@1/5/10 by global descriptor is measured after each epoch; null = none."""
    validation_batch_size: int = 16
    """Photos per forward pass in validation."""
    wandb: bool = False
    """Also log metrics to Weights & Biases (needs the wandb package)."""
    num_workers: int | None = None
    """Scheduling: DistributedDataParallel processes; null = one per GPU, or one without GPUs."""
    num_gpus_per_worker: float | None = None
    """GPUs per worker; 0 = train on the CPU; null = 1 if the cluster has GPUs."""
    num_threads_per_worker: int = 2
    """CPU threads of the network per worker; affects rounding."""
    loader_processes: int = 0
    """Scheduling: data-loading processes per worker; 0 = the worker loads its own data."""
    max_failures: int = 100
    """Scheduling: number of worker or node failures before the run gives up."""

    def __post_init__(self) -> None:
        require_text(self, "train.", "root", "start")
        require_positive(
            self,
            "train",
            "epochs",
            "max_steps",
            "global_batch_size",
            "clip_grad",
            "keep_every_epochs",
            "checkpoint_every_steps",
            "log_every_steps",
            "num_workers",
            "num_threads_per_worker",
            "validation_batch_size",
        )
        for name in ("seed", "loader_processes", "max_failures"):
            require(getattr(self, name) >= 0, f"train.{name}={getattr(self, name)}: expected 0 or more")
        require(
            self.num_gpus_per_worker is None
            or (self.num_gpus_per_worker >= 0 and float(self.num_gpus_per_worker).is_integer()),
            f"train.num_gpus_per_worker={self.num_gpus_per_worker}: expected 0, 1 or another whole number (NCCL wants "
            "a GPU for each worker)",
        )
        require(
            self.num_workers is None or self.num_workers <= self.global_batch_size,
            f"train.global_batch_size={self.global_batch_size} is smaller than train.num_workers={self.num_workers}: "
            "expected at least one sample for each worker",
        )


@dataclass(kw_only=True, slots=True)
class StageOneConfig(TrainConfig):
    """Place-aware masked image modelling (method, section 4)."""

    epochs: int = 500
    """Passes over the places."""
    datasets: list[TrainingSetName] = field(default_factory=lambda: list(TrainingSetName))
    """Training sets to use: any of sfxl, gsv_cities and gldv2."""
    gldv2_csv: str | None = None
    """Google Landmarks v2's train_clean.csv (path or URL); null = next to its train/ folder."""
    mask_ratio: float = 0.9
    """Fraction of the first view's patches to mask."""
    norm_pix_loss: bool = True
    """Normalise each target patch by its own mean and variance."""
    lr: float = 3e-4
    """Learning rate at a global batch of 1024; scaled by sqrt(global_batch_size / 1024)."""
    min_lr: float = 1e-6
    """Final learning rate of the cosine schedule."""
    warmup_epochs: float = 10
    """Epochs of linear warm-up from 0."""
    weight_decay: float = 0.04
    """Initial weight decay of the cosine schedule."""
    weight_decay_end: float = 0.4
    """Final weight decay of the cosine schedule."""
    layerwise_decay: float = 0.9
    """Learning-rate multiplier per layer, from the head down to the first encoder block."""
    patch_embed_lr_mult: float = 0.2
    """Learning-rate multiplier of the patch embedding."""
    accumulation_steps: int = 1
    """Micro-batches per step of each worker: less memory, the same step."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        require(
            len(self.datasets) > 0,
            f"train.datasets=[]: expected one or more of {', '.join(TrainingSetName)}",
        )
        require(len(set(self.datasets)) == len(self.datasets), "train.datasets: the same set is given twice")
        require(0 < self.mask_ratio < 1, f"train.mask_ratio={self.mask_ratio}: expected a number between 0 and 1")
        require_positive(self, "train", "lr", "layerwise_decay", "patch_embed_lr_mult", "accumulation_steps")
        for name in ("min_lr", "warmup_epochs", "weight_decay", "weight_decay_end"):
            require(getattr(self, name) >= 0, f"train.{name}={getattr(self, name)}: expected 0 or more")
        require(
            self.warmup_epochs < self.epochs,
            f"train.warmup_epochs={self.warmup_epochs}: expected fewer than train.epochs={self.epochs}",
        )
        require_text(self, "train.", "gldv2_csv")


@dataclass(kw_only=True, slots=True)
class StageTwoConfig(TrainConfig):
    """Descriptor and pair classifier together, on GSV-Cities (method, section 5); a sample is a place of 4 photos."""

    lr: float = 8e-5
    """Initial learning rate."""
    lr_end_factor: float = 0.2
    """Final learning rate, after decay_steps, as a fraction of lr."""
    decay_steps: int = 6225
    """Steps of linear decay; the learning rate is constant afterwards."""
    weight_decay: float = 0.05
    """Weight decay of all parameters."""
    pair_loss_weight: float = 2.0
    """Weight of the pair classifier's loss relative to the descriptor's."""
    num_augment_operations: int = 3
    """RandAugment operations per photo; 0 = none."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        require_positive(self, "train", "lr", "decay_steps", "pair_loss_weight")
        require(0 <= self.lr_end_factor <= 1, f"train.lr_end_factor={self.lr_end_factor}: expected 0 to 1")
        require(self.weight_decay >= 0, f"train.weight_decay={self.weight_decay}: expected 0 or more")
        require(
            self.num_augment_operations >= 0,
            f"train.num_augment_operations={self.num_augment_operations}: expected 0 or more",
        )


@dataclass(kw_only=True, slots=True)
class TrainJobConfig(BenchmarkJobConfig):
    """Settings of the jobs of both stages."""

    output: str = "???"
    """Output directory (path or URL) for checkpoints and metrics; run the same command again to resume."""
    model: ModelConfig = field(default_factory=ModelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        BenchmarkJobConfig.__post_init__(self)
        require_text(self, "", "output")
        require(
            self.model.weights is None,
            f"model.weights={self.model.weights}: training starts from train.start; expected model.weights=null",
        )
        require(
            not self.model.scaled_decoding,
            "model.scaled_decoding=true: training decodes photos in full size; expected model.scaled_decoding=false",
        )
        require(not self.model.compile, "model.compile=true: it is for inference; expected model.compile=false")
        require(
            self.model.max_megapixels == MAX_MEGAPIXELS,
            f"model.max_megapixels={self.model.max_megapixels:g}: training reads photos of up to {MAX_MEGAPIXELS:g} "
            f"megapixels; expected model.max_megapixels={MAX_MEGAPIXELS:g}",
        )


@dataclass(kw_only=True, slots=True)
class TrainStageOneConfig(TrainJobConfig):
    """`pairvpr train_stage_one`: place-aware pre-training of encoder and decoder."""

    train: StageOneConfig = field(default_factory=StageOneConfig)


@dataclass(kw_only=True, slots=True)
class TrainStageTwoConfig(TrainJobConfig):
    """`pairvpr train_stage_two`: global descriptor and pair classifier together."""

    train: StageTwoConfig = field(default_factory=StageTwoConfig)


@dataclass(kw_only=True, slots=True)
class SearchCheckpointsConfig(BenchmarkJobConfig):
    """`pairvpr search_checkpoints`: the two-stage evaluation of every stage-two checkpoint."""

    checkpoints: str = "???"
    """Folder (path or URL) of stage-two checkpoints or exported weights."""
    output: str = "???"
    """Output directory (path or URL) for the table and all evaluations; run the same command again to resume."""
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    describe: DescribePassConfig = field(default_factory=DescribePassConfig)
    rerank: RerankConfig = field(default_factory=RerankConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        BenchmarkJobConfig.__post_init__(self)
        require_text(self, "", "checkpoints", "output")
        require(
            self.model.weights is None,
            f"model.weights={self.model.weights}: the checkpoints are the weights; expected model.weights=null",
        )
        require(
            self.rerank.report_candidates is None,
            f"rerank.report_candidates={self.rerank.report_candidates}: checkpoints are not audited; expected null",
        )
        require(
            self.rerank.candidates is None,
            f"rerank.candidates={self.rerank.candidates}: each checkpoint finds its own candidates; expected null",
        )
        require(
            self.rerank.calibration is None,
            f"rerank.calibration={self.rerank.calibration}: a calibration is for one network, and there are several "
            "checkpoints; expected null",
        )
        require(
            self.rerank.dense_features is not DenseFeatures.store,
            "rerank.dense_features=store: a store is for one network, not several checkpoints; expected recompute or "
            "cache",
        )


@dataclass(kw_only=True, slots=True)
class ExportWeightsConfig:
    """`pairvpr export_weights`: convert a stage-two checkpoint to weights for evaluate."""

    checkpoint: str = "???"
    """Stage-two checkpoint (path or URL)."""
    output: str = "???"
    """File to write (path or URL), ending in .pth or .safetensors."""
    half: bool = False
    """Store 16-bit floats: half the size, rounded."""

    def __post_init__(self) -> None:
        require_text(self, "", "checkpoint", "output")
        require(
            self.output == "???" or self.output.endswith((".pth", ".safetensors")),
            f"output={self.output}: expected a name ending in .pth or .safetensors",
        )
