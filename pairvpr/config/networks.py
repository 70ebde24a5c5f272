"""The networks of `configs/model/` by name, and the one that a run's settings describe. Needs no Hydra."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from pairvpr.config.schema import DecoderConfig, EncoderConfig, Ffn, ModelConfig, Precision
from pairvpr.errors import UserError

_FILE_BESIDE = re.compile(r"\$\{pairvpr\.configs:(.+)\}")


def config_directory() -> Path:
    """`configs/` of a checkout, or the copy of it that a wheel carries inside the package."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def network_names() -> list[str]:
    """What `model=` may be."""
    return sorted(path.stem for path in (config_directory() / "model").glob("*.yaml"))


def named_network(name: str) -> ModelConfig:
    """The network `model=name`, with the weights that are published for it. Raises `UserError` for another name."""
    if name not in network_names():
        raise UserError(f"model={name}: unknown; expected one of {', '.join(network_names())}")
    values = yaml.safe_load((config_directory() / "model" / f"{name}.yaml").read_text("utf-8"))
    if values.get("weights") is not None:
        values["weights"] = _FILE_BESIDE.sub(lambda found: str(config_directory() / found[1]), values["weights"])
    return _network(values)


def network_of_settings(section: Mapping[str, Any]) -> ModelConfig:
    """The network of section `model` of an index's settings.json, without weights.

    Raises `UserError`, `ValueError` or `TypeError` for what is none.
    """
    known = {field.name for field in fields(ModelConfig)} - {"weights"}
    return _network({key: value for key, value in section.items() if key in known})


def _network(values: Mapping[str, Any]) -> ModelConfig:
    encoder = dict(values.get("encoder", {}))
    if "ffn" in encoder:
        encoder["ffn"] = Ffn(encoder["ffn"])
    # Which blocks are trained is no part of the settings of an index, and inference does not ask.
    encoder.setdefault("num_trainable_blocks", min(EncoderConfig().num_trainable_blocks, encoder.get("depth", 12)))
    nested = {"encoder": EncoderConfig(**encoder), "decoder": DecoderConfig(**values.get("decoder", {}))}
    if "precision" in values:
        nested["precision"] = Precision(values["precision"])
    return ModelConfig(**{**values, **nested})
