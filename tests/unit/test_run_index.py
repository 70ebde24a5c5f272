"""Which index the ids of a finished run belong to, after runs and indices were moved, replaced or extended."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pairvpr.config.schema import CalibrateConfig, ReportConfig
from pairvpr.data import sealed
from pairvpr.data.manifest import Manifest
from pairvpr.errors import UserError
from pairvpr.evaluation.calibrate import calibrate
from pairvpr.index.generations import commit, read_manifest
from pairvpr.index.make import LocalRunner
from pairvpr.index.update import with_added
from pairvpr.report.export import export
from pairvpr.report.finished import open_run
from pairvpr.report.make import make_report
from tests.support.finished import MadeUpRun, make_run
from tests.support.index import describe_rows, write_index

NUM_QUERIES = 240


def run_that_calibrates(folder: Path, seed: int = 0) -> MadeUpRun:
    """A run with more in its settings: what scored the pairs, and the database as evaluate and query record it."""
    made = make_run(folder, num_queries=NUM_QUERIES, seed=seed)
    file = str(folder / "settings.json")
    settings = sealed.read_json(file, "") or {}
    model = {"name": "small", "weights_sha256": "ab" * 32}
    database = {"root": made.benchmark.database.root}
    sealed.write_json(file, settings | {"model": model, "rerank": {"batch_size": 3}, "database": database})
    return made


def index_of(folder: Path, database: Manifest) -> None:
    """Another index in place of the one in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    write_index(str(folder), [], np.eye(len(database), 4, dtype=np.float32) + 0.1, images=database)


def others(database: Manifest) -> dict[str, Manifest]:
    """Databases that a run over `database` did not search."""
    paths, utm_m = database.paths, database.utm_m
    return {
        "fewer photos": database.take(np.arange(len(database) - 1)),
        "another order": Manifest.of(database.root, paths[::-1], utm_m),
        "one photo before": Manifest.of(database.root, ["a.jpg", *paths], np.concatenate([utm_m[:1], utm_m])),
        "other names": Manifest.of(database.root, [f"new/{path}" for path in paths], utm_m),
        "another folder": Manifest.of("/elsewhere", paths, utm_m + 500.0),
    }


KINDS = tuple(others(Manifest.of("/d", ["x.jpg", "y.jpg"], np.zeros((2, 2)))))
READERS: dict[str, Callable[[str, Path], object]] = {
    "report": lambda run, folder: make_report(ReportConfig(run=run, output=str(folder / "r.html"))),
    "export": lambda run, folder: export(run, "csv", output=str(folder / "answers.csv")),
    "calibrate": lambda run, folder: calibrate(CalibrateConfig(predictions=run, output=str(folder / "c.json"))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_moved_run_keeps_the_index_that_moved_with_it(tmp_path: Path, kind: str) -> None:
    """Another run has taken the place where this one was made."""
    made = run_that_calibrates(tmp_path / "OUT")
    before = Path(export(made.folder, "csv", output=str(tmp_path / "before.csv"))).read_text()
    fitted = calibrate(CalibrateConfig(predictions=made.folder, output=str(tmp_path / "before.json")))
    moved = (tmp_path / "OUT").rename(tmp_path / "OUT_baseline")
    index_of(tmp_path / "OUT" / "index", others(made.benchmark.database)[kind])
    assert Path(export(str(moved), "csv")).read_text() == before
    found = calibrate(CalibrateConfig(predictions=str(moved), output=str(tmp_path / "after.json")))
    assert found == fitted
    assert open_run(str(moved)).database.table.equals(made.benchmark.database.table)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_index_of_other_photos_is_refused_in_one_line(tmp_path: Path, kind: str, reader: str) -> None:
    made = run_that_calibrates(tmp_path / "OUT")
    moved = (tmp_path / "OUT").rename(tmp_path / "OUT_baseline")
    shutil.rmtree(moved / "index")
    index_of(tmp_path / "OUT" / "index", others(made.benchmark.database)[kind])
    with pytest.raises(UserError) as caught:
        READERS[reader](str(moved), tmp_path)
    said = str(caught.value)
    assert "\n" not in said
    for part in (
        f"{moved}: ",
        f"{tmp_path}/OUT/index (",
        f"expected the index that the run searched, in {moved}/index",
    ):
        assert part in said


def test_an_index_beside_the_run_that_is_another_one_is_passed_over(tmp_path: Path) -> None:
    """As of a run with index.path, in whose directory somebody built something else."""
    made = make_run(tmp_path / "OUT")
    (tmp_path / "OUT" / "index").rename(tmp_path / "INDEX")
    settings = sealed.read_json(f"{made.folder}/settings.json", "") or {}
    sealed.write_json(f"{made.folder}/settings.json", settings | {"index": {"path": str(tmp_path / "INDEX")}})
    index_of(tmp_path / "OUT" / "index", others(made.benchmark.database)["another order"])
    assert open_run(made.folder).database.paths == made.benchmark.database.paths


@pytest.mark.parametrize("reader", READERS)
def test_an_index_that_has_grown_since_is_that_of_the_run(tmp_path: Path, reader: str) -> None:
    """Photos that were added later take no part; the ids of the run are the first ones."""
    made = run_that_calibrates(tmp_path / "OUT")
    before = Path(export(made.folder, "csv", output=str(tmp_path / "before.csv"))).read_text()
    index = f"{made.folder}/index"
    manifest = read_manifest(index)
    assert manifest is not None
    added = Manifest.of(made.benchmark.database.root, ["new/1.jpg", "new/2.jpg"], np.full((2, 2), 9e5))
    prefix = "updates/000002-x/"
    rows = np.ones((2, manifest.descriptor_dim), np.float32)
    describe_rows(f"{index}/{prefix}".rstrip("/"), added, rows, [], first_id=manifest.num_images)
    draft = replace(manifest, generation=2)
    commit(index, with_added(index, draft, prefix, added, 1, 1, LocalRunner()))
    assert open_run(made.folder).database.table.equals(made.benchmark.database.table)
    READERS[reader](made.folder, tmp_path)
    if reader == "export":
        with (tmp_path / "answers.csv").open(newline="") as file:
            assert len(list(csv.reader(file))) > 1
        assert (tmp_path / "answers.csv").read_text() == before


def test_a_run_that_recorded_less_is_read(tmp_path: Path) -> None:
    made = make_run(tmp_path / "OUT")
    content = sealed.read_json(f"{made.folder}/metrics.json", "") or {}
    for name in ("database_paths_sha256", "num_database"):
        content["protocol"].pop(name)
        sealed.write_json(f"{made.folder}/metrics.json", content)
        assert open_run(made.folder).database.paths == made.benchmark.database.paths
