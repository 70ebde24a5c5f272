"""The table of jobs, and how one is run: `pairvpr JOB key=value ...` or `python -m ray_jobs.JOB key=value ...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

JOBS_PACKAGE = "ray_jobs"


@dataclass(frozen=True)
class Job:
    """A job; its work is the function `main(arguments)` of the module `ray_jobs.<name>`."""

    name: str
    schema: str
    """`module:class` of its settings."""

    @property
    def config(self) -> type:
        """The class of its settings."""
        module, name = self.schema.split(":")
        return getattr(import_module(module), name)

    def work(self, arguments: Sequence[str]) -> None:
        """Do it, in this process."""
        import_module(f"{JOBS_PACKAGE}.{self.name}").main(arguments)


SCHEMA, TRAIN_SCHEMA = "pairvpr.config.schema", "pairvpr.config.train_schema"
JOBS = {
    job.name: job
    for job in (
        Job("plan", f"{SCHEMA}:PlanConfig"),
        Job("build_index", f"{SCHEMA}:BuildIndexConfig"),
        Job("update_index", f"{SCHEMA}:UpdateIndexConfig"),
        Job("query", f"{SCHEMA}:QueryConfig"),
        Job("evaluate", f"{SCHEMA}:EvaluateConfig"),
        Job("check_benchmark", f"{SCHEMA}:CheckBenchmarkConfig"),
        Job("calibrate", f"{SCHEMA}:CalibrateConfig"),
        Job("train_stage_one", f"{TRAIN_SCHEMA}:TrainStageOneConfig"),
        Job("train_stage_two", f"{TRAIN_SCHEMA}:TrainStageTwoConfig"),
        Job("search_checkpoints", f"{TRAIN_SCHEMA}:SearchCheckpointsConfig"),
        Job("export_weights", f"{TRAIN_SCHEMA}:ExportWeightsConfig"),
    )
}


def run_job(name: str, arguments: Sequence[str] | None = None) -> int:
    """Run the job of this name with `arguments` (default: those of this process); returns its exit code."""
    job = JOBS[name]
    given = sys.argv[1:] if arguments is None else arguments
    if not given or any(word in ("-h", "--help") for word in given):
        from pairvpr.config.compose import help_text

        print(help_text(job.config))
        return 0
    from pairvpr.boundary import exit_code_of

    return exit_code_of(lambda: job.work(given))
