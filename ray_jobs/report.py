"""`pairvpr report OUT`: one HTML file that shows a finished run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pairvpr.cli import run_job
from pairvpr.config.compose import load
from pairvpr.config.schema import ReportConfig
from pairvpr.report.make import make_report
from pairvpr.secrets import without_secrets


def main(arguments: Sequence[str]) -> None:
    """One finished run; Ray is not needed."""
    print(without_secrets(make_report(load(ReportConfig, arguments))))


if __name__ == "__main__":
    sys.exit(run_job("report"))
