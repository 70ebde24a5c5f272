"""`python -m ray_jobs.update_index index.path=INDEX add=DIR remove=LIST.txt`: photos come and go."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pairvpr.config.compose import load
from pairvpr.config.schema import UpdateIndexConfig
from pairvpr.distributed.update import update_index
from ray_jobs.command import run


def main(arguments: Sequence[str]) -> None:
    """One change, one generation."""
    update_index(load(UpdateIndexConfig, arguments))


if __name__ == "__main__":
    sys.exit(run(UpdateIndexConfig, main))
