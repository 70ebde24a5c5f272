"""`python -m ray_jobs.search_checkpoints checkpoints=DIR benchmark=toy_city output=OUT`: which epoch is the best?"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pairvpr.config.compose import load
from pairvpr.config.train_schema import SearchCheckpointsConfig
from pairvpr.distributed.search_checkpoints import search_checkpoints
from ray_jobs.command import run


def main(arguments: Sequence[str]) -> None:
    """All checkpoints of one folder on one benchmark."""
    search_checkpoints(load(SearchCheckpointsConfig, arguments))


if __name__ == "__main__":
    sys.exit(run(SearchCheckpointsConfig, main))
