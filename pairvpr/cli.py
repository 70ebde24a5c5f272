"""The table of jobs, and running one: `pairvpr JOB key=value ...` or `python -m ray_jobs.JOB key=value ...`.

Nothing heavy is imported before a job runs, so that help and errors appear at once.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from pairvpr.needed import NEEDED, SETTINGS, lack

JOBS_PACKAGE = "ray_jobs"
GROUPS = ("use", "measure", "train", "look")
HELP, HELP_ALL, VERSION = ("-h", "--help"), "--help-all", "--version"


@dataclass(frozen=True)
class Job:
    """A job: the function `main(arguments)` of the module `ray_jobs.<name>`."""

    name: str
    group: str
    """One of `GROUPS`, under which it is listed."""
    about: str
    schema: str
    """Its settings class, as `module:class`."""
    examples: tuple[str, ...]
    """`key=value` of what most people set, the necessary ones first."""
    subject: str | None = None
    """The key that a word without `key=` sets."""

    @property
    def config(self) -> type:
        """The class of its settings."""
        module, name = self.schema.split(":")
        return getattr(import_module(module), name)

    def work(self, arguments: Sequence[str]) -> None:
        """Do it, in this process."""
        import_module(f"{JOBS_PACKAGE}.{self.name}").main(self._with_subject(arguments))

    def _with_subject(self, arguments: Sequence[str]) -> list[str]:
        """The same with `key=` before the one word that has none."""
        bare = [word for word in arguments if not re.match(r"[+~]?[a-z_.]+=", word)]
        if self.subject is None or len(bare) != 1:
            return [*arguments]
        quoted = bare[0].replace("\\", "\\\\").replace("'", "\\'")
        return [f"{self.subject}='{quoted}'" if word == bare[0] else word for word in arguments]


SCHEMA, TRAIN_SCHEMA = "pairvpr.config.schema", "pairvpr.config.train_schema"
MODEL = ("model=vitb", "model.weights=pairvpr-vitB.pth", "model.precision=bf16")
CLUSTER = ("cluster.address=auto",)
TRAIN = (
    *("train=vitb", "train.root=DATASETS", "output=OUT", "train.num_workers=4"),
    *("train.epochs=10", "train.seed=0", *CLUSTER),
)
JOBS = {
    job.name: job
    for job in (
        Job(
            "build_index",
            "use",
            "describe a folder of photos and index it",
            f"{SCHEMA}:BuildIndexConfig",
            (
                *("database=PHOTOS", "output=INDEX", *MODEL, "positions=names", "positions_table=places.csv"),
                *("index.kind=auto", "index.memory_budget_gib=16", "index.num_shards=8", "describe.num_actors=4"),
                *("describe.batch_size=32", *CLUSTER),
            ),
        ),
        Job(
            "update_index",
            "use",
            "add photos to an index, remove some, or change its kind",
            f"{SCHEMA}:UpdateIndexConfig",
            (
                *("index.path=INDEX", "add=PHOTOS/new", "remove=gone.txt", "compact=true", *MODEL, "positions=names"),
                *("index.kind=ivf_rabitq", "index.memory_budget_gib=16", "single_writer=true", *CLUSTER),
            ),
        ),
        Job(
            "query",
            "use",
            "find out where photos were taken, with an index that exists",
            f"{SCHEMA}:QueryConfig",
            (
                *("index.path=INDEX", "queries=PHOTOS", "output=OUT", *MODEL, "rerank.num_candidates=100"),
                *("filter.near_m=50", "filter.priors=priors.csv", "filter.box=[544000,4174000,546000,4176000]"),
                *("rerank.calibration=calibration.json", "rerank.not_in_map_below=0.5", *CLUSTER),
            ),
        ),
        Job(
            "serve",
            "use",
            "answer photos over HTTP: a photo in, a place out",
            "pairvpr.config.serve_schema:ServeConfig",
            (
                *("index.path=INDEX", *MODEL, "indices={sf: INDEX, oslo: s3://BUCKET/INDEX}"),
                *("rerank.num_candidates=100", "rerank.calibration=calibration.json"),
                *("serve.host=0.0.0.0", "serve.token_file=token.txt", "serve.refresh_s=60"),
                *("serve.num_replicas=2", "serve.split=true", "serve.num_shard_parts=4", *CLUSTER),
            ),
        ),
        Job(
            "evaluate",
            "measure",
            "measure recall on a benchmark: describe, index, retrieve, re-rank, report",
            f"{SCHEMA}:EvaluateConfig",
            (
                *("benchmark=toy_city", "output=OUT", "datasets_root=DATASETS", *MODEL, "rerank.num_candidates=100"),
                *("index.path=INDEX", "index.kind=auto", "describe.num_actors=4", "rerank.num_actors=4"),
                *("benchmarks=[toy_city,folders]", *CLUSTER),
            ),
        ),
        Job(
            "calibrate",
            "measure",
            "learn from an evaluation how sure an answer is, and when re-ranking may stop",
            f"{SCHEMA}:CalibrateConfig",
            ("predictions=OUT", "output=calibration.json", "max_loss=0.1"),
        ),
        Job(
            "report",
            "look",
            "show a finished run: one HTML file with charts, photos of right and wrong answers, a map",
            f"{SCHEMA}:ReportConfig",
            ("run=OUT", "output=report.html", "report.pictures=500", "report.explain=20", "report.weights=FILE"),
            subject="run",
        ),
        Job(
            "search_checkpoints",
            "measure",
            "evaluate the checkpoints of a training, and keep the best",
            f"{TRAIN_SCHEMA}:SearchCheckpointsConfig",
            ("checkpoints=RUN/checkpoints", "benchmark=toy_city", "model=vitb", "output=OUT", *CLUSTER),
        ),
        Job(
            "train_stage_one",
            "train",
            "train the encoder and the decoder to complete masked photos",
            f"{TRAIN_SCHEMA}:TrainStageOneConfig",
            ("train.start=dinov2_vitb14_reg4_pretrain.pth", "train.datasets=[sf_xl]", *TRAIN),
        ),
        Job(
            "train_stage_two",
            "train",
            "train descriptors and the pair classifier, from stage one",
            f"{TRAIN_SCHEMA}:TrainStageTwoConfig",
            ("train.start=ONE/checkpoints/last.pt", *TRAIN),
        ),
        Job(
            "export_weights",
            "train",
            "make a weights file of a checkpoint",
            f"{TRAIN_SCHEMA}:ExportWeightsConfig",
            ("checkpoint=RUN/checkpoints/last.pt", "output=mine.safetensors", "half=true"),
        ),
        Job(
            "plan",
            "look",
            "say what an index takes before it is built: sizes, memory, hours",
            f"{SCHEMA}:PlanConfig",
            (
                *("plan.num_images=2805840", "benchmark=sfxl_v1", "datasets_root=DATASETS", "model=vitb"),
                *("plan.images_per_s=1000", "index.memory_budget_gib=16", "index.num_shards=12"),
                *("plan.num_queries=1000", "output=plan.json", *CLUSTER),
            ),
        ),
        Job(
            "check_benchmark",
            "look",
            "say whether a benchmark's download is whole",
            f"{SCHEMA}:CheckBenchmarkConfig",
            ("benchmark=msls_val", "datasets_root=DATASETS", "num_opened=100"),
        ),
    )
}
LOOKS = {
    "compare": ("pairvpr.report.side_by_side", "put finished evaluations side by side: pairvpr compare OUT OUT2 ..."),
    "export": (
        "pairvpr.report.export",
        "write answers for other tools: pairvpr export OUT --to hloc|colmap|geojson|...",
    ),
    "status": ("pairvpr.status", "say how far a job is, or how it ended: pairvpr status OUT ..."),
    "completion": ("pairvpr.completion", 'complete jobs, keys and choices: eval "$(pairvpr completion bash)"'),
}
"""Commands that run no job: `main(arguments)` of a module, and what it does."""


def main() -> int:
    """The command `pairvpr`; returns its exit code."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in HELP:
        print(overview())
        return 0
    if name == VERSION:
        from pairvpr import __version__

        print(f"pairvpr {__version__}")
        return 0
    if name in LOOKS:
        return 2 if _lacks(NEEDED[name]) else import_module(LOOKS[name][0]).main(arguments)
    if name not in JOBS:
        print(f"error: {name}: no such job; {_choices(name)}", file=sys.stderr)
        return 2
    return run_job(name, arguments)


def run_job(name: str, arguments: Sequence[str] | None = None) -> int:
    """Run the job of this name with `arguments` (default: those of this process); returns its exit code."""
    job = JOBS[name]
    given = sys.argv[1:] if arguments is None else arguments
    is_help = not given or any(word in (*HELP, HELP_ALL) for word in given)
    if _lacks(SETTINGS if is_help else NEEDED[name]):
        return 2
    if HELP_ALL in given:
        from pairvpr.config.compose import help_text

        print(help_text(job.config))
        return 0
    if is_help:
        print(short_help(job))
        return 0
    from pairvpr.boundary import exit_code_of

    return exit_code_of(lambda: job.work(given))


def _lacks(modules: Sequence[str]) -> bool:
    """Whether one of the modules is not installed, which is said in one line."""
    line = lack(modules)
    if line is not None:
        print(f"error: {line}", file=sys.stderr)
    return line is not None


def overview() -> str:
    """All jobs, one line each, by group."""
    lines = ["usage: pairvpr JOB key=value ...", "       pairvpr JOB --help       what most people set, with examples"]
    lines += ["       pairvpr JOB --help-all   every key", "       pairvpr --version"]
    width = max(map(len, JOBS))
    for group in GROUPS:
        lines += ["", f"{group}:"]
        lines += [f"  {job.name:<{width}}  {job.about}" for job in JOBS.values() if job.group == group]
        if group == "look":
            lines += [f"  {name:<{width}}  {about}" for name, (_, about) in LOOKS.items()]
    return "\n".join(lines)


def short_help(job: Job) -> str:
    """A job's most common settings, each with an example and its meaning."""
    from pairvpr.config.compose import documented_keys

    documented = documented_keys(job.config)
    lines = [f"usage: pairvpr {job.name} key=value ...", "", f"{job.about[0].upper()}{job.about[1:]}.", ""]
    for example in job.examples:
        lines += [f"  {example}", f"      {documented[example.partition('=')[0]]}"]
    return "\n".join([*lines, "", f"Every key: pairvpr {job.name} {HELP_ALL}"])


def _choices(name: str) -> str:
    names = [*JOBS, *LOOKS]
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}expected one of {', '.join(names)}, or --help"
