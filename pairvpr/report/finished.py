"""A finished run as reports and exports read it: its numbers, its settings, the names and places of its photos."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pairvpr.config.schema import MAX_MEGAPIXELS
from pairvpr.data import sealed, storage
from pairvpr.data.claim import FILE as SETTINGS_FILE
from pairvpr.data.manifest import Manifest
from pairvpr.errors import UserError
from pairvpr.evaluation.predictions_file import FinalOrder, final_order_of
from pairvpr.evaluation.run_index import index_places, photos_of_run
from pairvpr.index.descriptor_shards import REJECTED, read_rejected
from pairvpr.secrets import without_secrets

STEPS = (
    ("queries/described.json", "describing the queries"),
    ("candidates.parquet", "retrieving candidates"),
    ("predictions.parquet", "re-ranking"),
)
"""What each step of a run leaves behind, in their order; the first one is the index, which may lie elsewhere."""
NEEDED = ("benchmark", "protocol", "model", "recall", "num_candidates", "seconds_per_query")


@dataclass(frozen=True)
class FinishedRun:
    """A run with or without ground truth. Photos' ids are positions in `database` and `queries`."""

    url: str
    """As the user wrote it, to read files; texts show `name`."""
    metrics: dict[str, Any]
    settings: dict[str, Any]

    @property
    def predictions(self) -> str:
        """Path or URL of its predictions."""
        return storage.join(self.url, "predictions.parquet")

    @property
    def name(self) -> str:
        """Its URL as texts show it, without a password."""
        return without_secrets(self.url)

    @property
    def order(self) -> FinalOrder:
        """Which of its answers are the final ones."""
        return final_order_of(self.metrics)

    @property
    def max_megapixels(self) -> float:
        """Photos of more pixels were rejected."""
        return self.settings.get("model", {}).get("max_megapixels", MAX_MEGAPIXELS)

    @cached_property
    def database(self) -> Manifest:
        """The photos of its index, removed ones too. Raises `UserError` where that is gone, or another one."""
        photos = photos_of_run(self.url, self.settings, self.metrics["protocol"])
        if photos is None:
            places = " and ".join(index_places(self.url, self.settings))
            raise UserError(f"{self.url}: its index is gone, which has the names of the photos; looked at {places}")
        return photos

    @cached_property
    def queries(self) -> Manifest:
        """The query photos."""
        url = storage.join(self.url, "queries", "images.parquet")
        try:
            return Manifest.read(url, self.settings["queries"]["root"])
        except FileNotFoundError as error:
            raise UserError(f"{url}: no such file, which has the names of the queries; expected a whole run") from error

    @cached_property
    def rejected_queries(self) -> NDArray[np.bool_]:
        """(Q,) which query photos could not be read when they were described."""
        found = np.zeros(len(self.queries), np.bool_)
        directory = storage.join(self.url, "queries")
        if storage.exists(storage.join(directory, REJECTED)):
            ids = self.queries.ids_of(read_rejected(directory).column("path"))
            found[ids[ids >= 0]] = True
        return found


def open_run(url: str) -> FinishedRun:
    """The run in the directory `url`.

    Raises `UserError` for what is no run, and for an unfinished one, with the step it stopped at.
    """
    settings = sealed.read_json(storage.join(url, SETTINGS_FILE), "expected the settings of a run")
    if settings is None:
        if storage.exists(storage.join(url, "metrics.json")):
            raise UserError(f"{url}: no {SETTINGS_FILE} there, which says where its photos are; expected a whole run")
        raise UserError(f"{url}: no run there; expected the output directory of evaluate or query")
    try:
        root, made_in = settings["queries"]["root"], settings["index"]["path"]
        if not isinstance(root, str) or not isinstance(made_in, str):
            raise TypeError
    except (KeyError, TypeError) as error:
        raise UserError(f"{url}: made by another job; expected the output directory of evaluate or query") from error
    metrics = sealed.read_json(storage.join(url, "metrics.json"), "expected the metrics.json of a run")
    if metrics is None:
        raise UserError(
            f"{url}: the run is not finished, it stopped at {_stopped_at(url, settings)}; run the command that began "
            "it again to finish it"
        )
    _check(metrics, url)
    return FinishedRun(url, metrics, settings)


def _stopped_at(url: str, settings: Mapping[str, Any]) -> str:
    if not any(storage.exists(storage.join(place, "manifest.json")) for place in index_places(url, settings)):
        return "building the index"
    return next((step for file, step in STEPS if not storage.exists(storage.join(url, file))), "the report")


def _check(metrics: Mapping[str, Any], url: str) -> None:
    """Raise `UserError` unless these are the numbers of a run."""
    file = storage.join(url, "metrics.json")
    missing = [name for name in NEEDED if name not in metrics]
    if missing:
        raise UserError(f"{file}: no entry {', '.join(missing)}; expected the metrics.json of a run")
    tables = ("protocol", "model", "seconds_per_query", *(["recall"] if metrics["recall"] is not None else []))
    wrong = [name for name in tables if not isinstance(metrics[name], dict)]
    decision = metrics.get("decision") or {"rule": None}
    if wrong or not isinstance(metrics["benchmark"], str) or not isinstance(decision, dict) or "rule" not in decision:
        raise UserError(f"{file}: damaged; expected the metrics.json of a run")
