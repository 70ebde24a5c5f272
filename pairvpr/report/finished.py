"""A finished run as reports and exports read it: its numbers, its settings, the names and places of its photos."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pairvpr.data import sealed, storage
from pairvpr.data.claim import FILE as SETTINGS_FILE
from pairvpr.data.manifest import Manifest
from pairvpr.errors import UserError
from pairvpr.index.generations import read_images, read_manifest

STEPS = (
    ("{index}/manifest.json", "building the index"),
    ("queries/described.json", "describing the queries"),
    ("candidates.parquet", "retrieving candidates"),
    ("predictions.parquet", "re-ranking"),
)
"""What each step of a run leaves behind, in their order."""
NEEDED = ("benchmark", "protocol", "model", "recall", "num_candidates", "seconds_per_query")


@dataclass(frozen=True)
class FinishedRun:
    """A run with or without ground truth. Photos' ids are positions in `database` and `queries`."""

    url: str
    """As the user wrote it."""
    metrics: dict[str, Any]
    settings: dict[str, Any]
    index: str
    """Directory of its index."""

    @property
    def predictions(self) -> str:
        """Path or URL of its predictions."""
        return storage.join(self.url, "predictions.parquet")

    @cached_property
    def database(self) -> Manifest:
        """The photos of its index, removed ones too."""
        manifest = read_manifest(self.index)
        if manifest is None:
            raise UserError(f"{self.url}: its index {self.index} is gone, which has the names of the photos")
        return read_images(self.index, manifest)

    @cached_property
    def queries(self) -> Manifest:
        """The query photos."""
        url = storage.join(self.url, "queries", "images.parquet")
        try:
            return Manifest.read(url, self.settings["queries"]["root"])
        except FileNotFoundError as error:
            raise UserError(f"{url}: no such file, which has the names of the queries; expected a whole run") from error


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
    index = _index_now(url, made_in)
    metrics = sealed.read_json(storage.join(url, "metrics.json"), "expected the metrics.json of a run")
    if metrics is None:
        raise UserError(
            f"{url}: the run is not finished, it stopped at {_stopped_at(url, index)}; run the command that began it "
            "again to finish it"
        )
    _check(metrics, url)
    return FinishedRun(url, metrics, settings, index)


def _index_now(url: str, made_in: str) -> str:
    """Where the index is: where it was made, or beside the run where both were moved together."""
    beside = storage.join(url, "index")
    here = storage.exists(storage.join(made_in, "manifest.json"))
    return beside if not here and storage.exists(storage.join(beside, "manifest.json")) else made_in


def _stopped_at(url: str, index: str) -> str:
    for file, step in STEPS:
        if not storage.exists(file.format(index=index) if "{" in file else storage.join(url, file)):
            return step
    return "the report"


def _check(metrics: Mapping[str, Any], url: str) -> None:
    """Raise `UserError` unless these are the numbers of a run."""
    file = storage.join(url, "metrics.json")
    missing = [name for name in NEEDED if name not in metrics]
    if missing:
        raise UserError(f"{file}: no entry {', '.join(missing)}; expected the metrics.json of a run")
    tables = ("protocol", "model", "seconds_per_query", *(["recall"] if metrics["recall"] is not None else []))
    wrong = [name for name in tables if not isinstance(metrics[name], dict)]
    if wrong or not isinstance(metrics["benchmark"], str):
        raise UserError(f"{file}: damaged; expected the metrics.json of a run")
