"""`python -m ray_jobs.build_index database=DIR output=INDEX`: describe a folder of photos and index it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pairvpr.config.compose import load
from pairvpr.config.schema import BuildIndexConfig
from pairvpr.distributed.build import build
from ray_jobs.command import run


def main(arguments: Sequence[str]) -> None:
    """One index."""
    print(f"index: {build(load(BuildIndexConfig, arguments))}")


if __name__ == "__main__":
    sys.exit(run(BuildIndexConfig, main))
