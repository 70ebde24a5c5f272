"""`pairvpr export_weights checkpoint=FILE output=FILE.safetensors`: what `evaluate` loads."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pairvpr.cli import run_job
from pairvpr.config.compose import load
from pairvpr.config.train_schema import ExportWeightsConfig
from pairvpr.training.export import export_weights


def main(arguments: Sequence[str]) -> None:
    """One checkpoint; no Ray is started."""
    config = load(ExportWeightsConfig, arguments)
    export_weights(config.checkpoint, config.output, half=config.half)


if __name__ == "__main__":
    sys.exit(run_job("export_weights"))
