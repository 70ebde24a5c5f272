"""The commands: `python -m ray_jobs.evaluate ...`, on a laptop or under `ray job submit`."""

import socket
import sys
from importlib.util import find_spec

NEEDED = {
    "faiss": "faiss-cpu or faiss-gpu",
    "fsspec": "fsspec",
    "huggingface_hub": "huggingface_hub",
    "hydra": "hydra-core",
    "numpy": "numpy",
    "PIL": "pillow",
    "psutil": "psutil",
    "pyarrow": "pyarrow",
    "pytorch_metric_learning": "pytorch-metric-learning",
    "ray": "ray",
    "rich": "rich",
    "s3fs": "s3fs",
    "safetensors": "safetensors",
    "scipy": "scipy",
    "tensorboardX": "tensorboardx",
    "torch": "torch",
    "yaml": "pyyaml",
}
"""Modules that jobs import, and the packages they are in; extras aside."""


def _check_packages() -> None:
    """End with one line where a cluster's Python lacks packages: `--working-dir` brings the code alone."""
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        print(
            f"error: {sys.executable} of {socket.gethostname()} lacks {', '.join(missing)}; expected `uv run --extra "
            "cpu python -m ray_jobs.JOB ...`, or the packages of requirements/ on every node (docs/cluster.md)",
            file=sys.stderr,
        )
        raise SystemExit(2)


_check_packages()
