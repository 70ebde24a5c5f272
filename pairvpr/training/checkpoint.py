"""Checkpoints: one file each, published atomically, read with pickle's machinery off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pairvpr.data import sealed, storage
from pairvpr.errors import UserError

FORMAT_VERSION = 1
FOLDER = "checkpoints"
KEYS = {"stage", "position", "counts", "settings", "model", "optimizer", "scaler"}


@dataclass(frozen=True)
class Position:
    """A run's progress: `step` steps are done, `batch` of them in epoch `epoch`."""

    epoch: int = 0
    batch: int = 0
    step: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to continue; all random draws follow from settings and position."""

    stage: int
    position: Position
    counts: Mapping[str, int]
    settings: Mapping[str, Any]
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    scaler: Mapping[str, Any]


def last_url(output: str) -> str:
    """The rolling checkpoint of a run."""
    return storage.join(output, FOLDER, "last.pt")


def kept_url(output: str, position: Position) -> str:
    """The name of the permanent checkpoint at a position."""
    name = f"epoch_{position.epoch:04d}" if position.batch == 0 else f"step_{position.step:08d}"
    return storage.join(output, FOLDER, f"{name}.pt")


def steps_done(output: str) -> int:
    """Steps done in the rolling checkpoint; 0 without one. Checks its seal without loading tensors.

    Raises `UserError` if it is not a checkpoint.
    """
    url = last_url(output)
    try:
        with FakeTensorMode():  # tensors have shapes and no values
            return _checked(url, "output").position.step
    except FileNotFoundError:
        return 0


def save_last(output: str, checkpoint: Checkpoint) -> None:
    """Publish the rolling checkpoint: this one file records a run's progress."""
    save(last_url(output), checkpoint)


def save(url: str, checkpoint: Checkpoint) -> None:
    """Publish a checkpoint atomically (path or URL)."""
    content = {
        "format_version": FORMAT_VERSION,
        "stage": checkpoint.stage,
        "position": asdict(checkpoint.position),
        "counts": dict(checkpoint.counts),
        "settings": dict(checkpoint.settings),
        "model": dict(checkpoint.model),
        "optimizer": dict(checkpoint.optimizer),
        "scaler": dict(checkpoint.scaler),
    }
    with storage.written_locally(url) as path:
        torch.save(content, path)
        with path.open("r+b") as file:
            sealed.seal_archive(file)


def load(url: str, stage: int, key: str) -> Checkpoint:
    """Read a checkpoint of `stage`. Raises `FileNotFoundError`, and `UserError`, naming `key`, if it is not one."""
    found = _checked(url, key)
    if found.stage != stage:
        raise UserError(f"{key}={url}: it is it is a checkpoint of stage {found.stage}; expected one of stage {stage}")
    return found


def _checked(url: str, key: str) -> Checkpoint:
    """Read a checkpoint of either stage."""
    with storage.open_input(url) as file:
        sealed.check_archive(file, url, f"expected a whole checkpoint ({key})")
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # the unpickler raises almost any exception on damaged bytes
            raise UserError(f"{key}={url}: not a checkpoint of this project: {storage.reason(error)}") from error
    if not isinstance(content, dict) or "format_version" not in content:
        raise UserError(f"{key}={url}: not a checkpoint of this project (weights alone, perhaps)")
    if content["format_version"] != FORMAT_VERSION:
        raise UserError(f"{key}={url}: format version {content['format_version']}; expected {FORMAT_VERSION}")
    missing = KEYS - content.keys()
    if missing:
        raise UserError(f"{key}={url}: an incomplete checkpoint, without {', '.join(sorted(missing))}")
    return Checkpoint(
        stage=content["stage"],
        position=Position(**content["position"]),
        counts=content["counts"],
        settings=content["settings"],
        model=content["model"],
        optimizer=content["optimizer"],
        scaler=content["scaler"],
    )
