"""`python -m ray_jobs.query index.path=INDEX queries=DIR output=OUT`: where was each of these photos taken?"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pairvpr.config.compose import load
from pairvpr.config.schema import QueryConfig
from pairvpr.distributed.query import query
from ray_jobs.command import run


def main(arguments: Sequence[str]) -> None:
    """One folder of queries."""
    query(load(QueryConfig, arguments))


if __name__ == "__main__":
    sys.exit(run(QueryConfig, main))
