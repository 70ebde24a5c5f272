"""The packages that each command imports, and one line where they are not installed.

Needs the standard library alone. `tests/unit/test_needed_packages.py` compares the lists with the imports.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterable
from importlib.util import find_spec

PACKAGES = {
    "faiss": "faiss-cpu (or faiss-gpu)",
    "fastapi": "fastapi",
    "fastapi_offline": "fastapi-offline",
    "fsspec": "fsspec",
    "huggingface_hub": "huggingface_hub",
    "hydra": "hydra-core",
    "numpy": "numpy",
    "PIL": "pillow",
    "prometheus_client": "prometheus-client",
    "psutil": "psutil",
    "pyarrow": "pyarrow",
    "pydantic": "pydantic",
    "python_multipart": "python-multipart",
    "pytorch_metric_learning": "pytorch-metric-learning",
    "ray": "ray",
    "rich": "rich",
    "s3fs": "s3fs",
    "safetensors": "safetensors",
    "scipy": "scipy",
    "starlette": "starlette",
    "tensorboardX": "tensorboardx",
    "torch": "torch",
    "uvicorn": "uvicorn",
    "yaml": "pyyaml",
}
"""Each module that some command imports, and the package that has it."""
SERVING = ("fastapi", "fastapi_offline", "prometheus_client", "pydantic", "python_multipart", "starlette", "uvicorn")
"""What the extra `serve` brings."""
SETTINGS = ("hydra", "yaml")
"""What reads settings, and prints help on them."""
_FILES = (*SETTINGS, "numpy", "pyarrow")
_INDEX = (*_FILES, "PIL", "faiss", "psutil", "ray", "torch")
_TRAIN = (*_INDEX, "scipy", "tensorboardX")
NEEDED = {
    "build_index": _INDEX,
    "update_index": _INDEX,
    "query": _INDEX,
    "serve": (*_INDEX, *SERVING),
    "evaluate": (*_INDEX, "scipy"),
    "search_checkpoints": (*_INDEX, "scipy"),
    "plan": (*_INDEX, "scipy"),
    "train_stage_one": _TRAIN,
    "train_stage_two": _TRAIN,
    "calibrate": _FILES,
    "check_benchmark": (*_FILES, "PIL", "scipy"),
    "report": (*_FILES, "PIL"),
    "export_weights": (*_FILES, "torch"),
    "compare": ("numpy", "pyarrow", "PIL"),
    "export": ("numpy", "pyarrow", "PIL"),
    "status": ("pyarrow",),
    "completion": SETTINGS,
}
"""The modules that a command imports whatever its settings are."""
WITH_PACKAGES = "uv run --no-project --with-requirements requirements/cluster.lock python -m"
"""Runs a module on a cluster whose Python lacks the packages."""
_SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by `ray job submit` in the environment of what it starts."""


def lack(modules: Iterable[str]) -> str | None:
    """One line on those of the modules that are not installed, and how to install them; None if all are."""
    missing = [module for module in modules if find_spec(module) is None]
    if not missing:
        return None
    extras = "cpu,serve" if set(missing) & set(SERVING) else "cpu"
    where, everywhere = sys.executable, ""
    if _SUBMITTED in os.environ:
        where = f"{where} of {socket.gethostname()}"
        everywhere = f" on every node of the cluster, or `{WITH_PACKAGES} ray_jobs.JOB ...` (docs/cluster.md)"
    names = ", ".join(PACKAGES[module] for module in missing)
    return f'{where} lacks {names}; expected pip install "pairvpr[{extras}]"{everywhere}'
