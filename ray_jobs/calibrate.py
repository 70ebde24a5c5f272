"""`pairvpr calibrate predictions=OUT output=calibration.json`: fit confidence and early stopping."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pairvpr.cli import run_job
from pairvpr.config.compose import load
from pairvpr.config.schema import CalibrateConfig
from pairvpr.evaluation.calibrate import calibrate
from pairvpr.secrets import without_secrets


def main(arguments: Sequence[str]) -> None:
    """One evaluation; neither Ray nor torch is needed."""
    config = load(CalibrateConfig, arguments)
    calibrate(config)
    print(without_secrets(f"\n{config.output}"))


if __name__ == "__main__":
    sys.exit(run_job("calibrate"))
