"""Metrics written by rank 0: `metrics.jsonl`, TensorBoard, and optionally Weights & Biases.

Rows are published just before each checkpoint; rows of repeated steps are dropped.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from pairvpr.data import sealed, storage
from pairvpr.errors import UserError

FILE = "metrics.jsonl"


class MetricsLog:
    """The log of one run, from step `first_step` on (steps done before the start)."""

    def __init__(self, output: str, first_step: int, *, wandb: bool, settings: Mapping[str, Any]) -> None:
        self.output = output
        self.rows = [row for row in read_metrics(output) if row["step"] <= first_step]
        self._folder = tempfile.TemporaryDirectory(prefix="pairvpr-")
        self._events = SummaryWriter(self._folder.name, purge_step=first_step + 1)
        self._wandb = _start_wandb(output, settings) if wandb else None

    def add(self, row: Mapping[str, Any]) -> None:
        """Add one row; numbers also go to TensorBoard, under their names."""
        self.rows.append(dict(row))
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                self._events.add_scalar(name, value, row["step"])
        if self._wandb is not None:
            self._wandb.log(dict(row), step=row["step"])

    def publish(self) -> None:
        """Publish everything so far below `output`."""
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        storage.write_bytes(storage.join(self.output, FILE), text.encode())
        self._events.flush()
        for file in Path(self._folder.name).iterdir():
            storage.write_bytes(storage.join(self.output, "tensorboard", file.name), file.read_bytes())

    def close(self) -> None:
        """Close files and connections without publishing more."""
        self._events.close()
        self._folder.cleanup()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(output: str) -> list[dict[str, Any]]:
    """All published rows; none without a log. Raises `UserError` if it is not a log.

    The log has no seal: other tools read it line by line, and nothing that is computed depends on it.
    """
    url, remedy = storage.join(output, FILE), "delete it; the run goes on with a new log"
    data = sealed.read_bytes(url)
    try:
        rows = [json.loads(line) for line in (data or b"").decode().splitlines()]
    except (ValueError, RecursionError) as error:
        raise sealed.DamagedFileError(url, f"not lines of JSON ({storage.reason(error)})", remedy) from error
    if not all(isinstance(row, dict) and type(row.get("step")) is int for row in rows):
        raise sealed.DamagedFileError(url, "a row has no step", remedy)
    return rows


def check_wandb() -> None:
    """Raise `UserError` if the package is missing."""
    try:
        import wandb  # noqa: F401  # pyright: ignore[reportMissingImports, reportUnusedImport]
    except ImportError as error:
        raise UserError("train.wandb=true: the package wandb is missing; expected `pip install wandb`") from error


def _start_wandb(output: str, settings: Mapping[str, Any]) -> Any:
    import wandb  # pyright: ignore[reportMissingImports]

    run = hashlib.sha256(output.encode()).hexdigest()[:16]  # a resumed run is the same one
    name = output.rstrip("/").rsplit("/", 1)[-1]
    return wandb.init(project="pairvpr", id=run, resume="allow", name=name, config=dict(settings))
