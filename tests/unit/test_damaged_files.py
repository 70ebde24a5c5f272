"""Every own file that a run reads back, damaged at random: the undamaged answer, one line for people, or made anew.

Files are also swapped with one another: those of another shard, unit or part are found although each is whole.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pairvpr.config.schema import BuildConfig, IndexKind
from pairvpr.data import sealed
from pairvpr.data.claim import check_claim, claim
from pairvpr.data.manifest import Manifest
from pairvpr.data.photo_batches import PhotoBatch
from pairvpr.data.storage import StorageError
from pairvpr.data.training_sets import sfxl
from pairvpr.distributed import parts, rerank, retrieve
from pairvpr.errors import IncompleteRunError, UserError
from pairvpr.evaluation.compare import first_answer_is_right, read_run
from pairvpr.evaluation.confidence import Calibration, read_calibration
from pairvpr.index import descriptor_shards
from pairvpr.index.generations import read_images, read_manifest
from pairvpr.index.make import LocalRunner, first_generation, next_generation
from pairvpr.index.reader import search_index
from pairvpr.retrieval.dense_store import DenseStore
from pairvpr.retrieval.rerank import Reranked, WorkUnit
from pairvpr.training import checkpoint
from pairvpr.training.checkpoint import Checkpoint, Position
from tests.support.index import FLAT, MODEL, PLENTY_BYTES, opened, write_index
from tests.support.runs import BEFORE_SEALS

ROWS = np.random.default_rng(0).standard_normal((60, 8)).astype(np.float32)
IMAGES = Manifest.of("/photos", [f"{number:02d}.jpg" for number in range(60)])
UNITS = [WorkUnit(0, {0: [3, 1, 2], 1: [2, 3, 4]}), WorkUnit(1, {2: [3, 1, 2], 3: [2, 3, 4]})]
SETTINGS = {"model": {"name": "small", "depth": 2}, "radius_m": 25.0}
MADE_ANEW = "made anew"


@dataclass
class Area:
    """Files that are read together: how they come to be, and how they are read."""

    write: Callable[[Path], object]
    read: Callable[[Path], Any]


def _index(kind: IndexKind) -> Callable[[Path], object]:
    config = BuildConfig(kind=kind, num_lists=None if kind is IndexKind.flat else 4, num_build_threads=1)
    return lambda folder: write_index(
        str(folder), IMAGES.paths, ROWS, [20, 40], config=config, rejected={7: "broken"}, images=IMAGES
    )


def _search(folder: Path) -> Any:
    manifest = read_manifest(str(folder))
    assert manifest is not None
    distances, ids = search_index(opened(str(folder), manifest), ROWS[:5], 4, num_threads=1)
    return read_images(str(folder), manifest).paths, distances.tolist(), ids.tolist()


def _build_again(folder: Path) -> Any:
    """As a run that was killed before its commit goes on: descriptions and markers are read."""
    draft = first_generation(str(folder), IMAGES, 3, MODEL, 8)
    return next_generation(str(folder), draft, FLAT, PLENTY_BYTES, LocalRunner())


def _described(folder: Path) -> Any:
    ids, rows = descriptor_shards.read_descriptors(str(folder))
    return (
        descriptor_shards.read_description(str(folder)),
        descriptor_shards.read_rejected(str(folder)).to_pylist(),
        ids.tolist(),
        rows.tolist(),
    )


def _write_candidates(folder: Path) -> None:
    for name, first in (("candidates.parquet", 0), ("of_others.parquet", 4)):
        ids = np.arange(12).reshape(4, 3)
        found = retrieve.Candidates(np.arange(first, first + 4), ids.astype(np.float32), ids, 1.5, 1)
        retrieve._write_candidates(str(folder / name), found)


def _candidates(folder: Path) -> Any:
    found = retrieve._kept_candidates(str(folder / "candidates.parquet"), np.arange(4), 60)
    return MADE_ANEW if found is None else [found.ids.tolist(), found.squared_distances.tolist(), found.generation]


def _write_units(folder: Path) -> None:
    for unit in UNITS:
        answers = [
            Reranked(query, np.array(ids), np.array([3, 2, unit.unit], np.float32))
            for query, ids in unit.candidates.items()
        ]
        rerank._write_unit(str(folder), unit.unit, answers, rerank.UnitFacts(0.5, rerank.Lost(), "an engine"))


def _units(folder: Path) -> Any:
    if rerank.unfinished(UNITS, str(folder)):
        return MADE_ANEW
    found = rerank._read_units(str(folder), UNITS)
    assert found.attention == "an engine"
    return [(query, its.ids.tolist(), its.pair_scores.tolist()) for query, its in found.by_query.items()], found.seconds


def _write_parts(folder: Path) -> None:
    cut = parts.Parts(str(folder), 20, 10)
    for part in range(2):
        ids = cut.ids(part)
        photos = PhotoBatch(ids.start, np.zeros((10, 2, 2, 3), np.uint8), {3: "broken"})
        parts.write(cut.url(part), photos, ROWS[ids.start : ids.stop], 1.0)


def _parts(folder: Path) -> Any:
    urls = [str(path) for path in sorted(folder.iterdir())]
    return [
        {name: array.tolist() for name, array in parts._arrays(url, Path(url).read_bytes()).items()} for url in urls
    ]


def _run(folder: Path) -> Any:
    run = read_run(str(folder))
    check_claim(str(folder), sealed.read_json(str(BEFORE_SEALS / "run" / "settings.json"), "") or {}, "output")
    return run.metrics["recall"], first_answer_is_right(run).tolist()


def _write_run(folder: Path) -> None:
    """A run as it is written today, from one of an earlier version."""
    before, remedy = BEFORE_SEALS / "run", ""
    schema = pq.read_schema(before / "predictions.parquet").remove_metadata()
    table = sealed.read_parquet(str(before / "predictions.parquet"), schema, remedy)
    assert table is not None
    sealed.write_parquet(str(folder / "predictions.parquet"), table)
    for name in ("metrics.json", "settings.json"):
        sealed.write_json(str(folder / name), sealed.read_json(str(before / name), remedy) or {})


def _write_calibration(folder: Path) -> None:
    model = {"name": "small", "weights_sha256": "ab" * 32}
    found = Calibration(
        benchmark="city",
        num_queries=50,
        num_candidates=4,
        model=model,
        temperature=1.5,
        midpoint=0.25,
        round_size=4,
        stop_margin=None,
    )
    sealed.write_json(str(folder / "calibration.json"), found.content())


def _write_checkpoint(folder: Path) -> None:
    state = {"weights": torch.arange(30.0)}
    checkpoint.save_last(str(folder), Checkpoint(2, Position(1, 0, 5), {"images": 20}, {}, state, {}, {}))


def _checkpoint(folder: Path) -> Any:
    found = checkpoint.load(checkpoint.last_url(str(folder)), 2, "train.start")
    return found.position, found.counts, found.model["weights"].tolist()


def _places() -> pa.Table:
    paths = pa.array([f"{number}.jpg" for number in range(12)], pa.large_string())
    return sfxl._table(paths, np.arange(24.0).reshape(12, 2), np.arange(12.0), np.array([6, 6]))


def _grouping(folder: Path) -> Any:
    found = sfxl._cached(str(folder / "sfxl.parquet"), "/root", _places)
    return found.paths.to_pylist(), found.utm_m.tolist(), found.offsets.tolist()


def _dense(folder: Path) -> Any:
    found = DenseStore.open(str(folder))
    found.check()
    return found.manifest, [found.read(int(row.first_id)).sum().item() for row in found.manifest.shards]


AREAS = {
    "flat index": Area(_index(IndexKind.flat), _search),
    "learnt index": Area(_index(IndexKind.ivf_rabitq), _search),
    "unfinished index": Area(_index(IndexKind.flat), _build_again),
    "description": Area(_index(IndexKind.flat), _described),
    "candidates": Area(_write_candidates, _candidates),
    "units": Area(_write_units, _units),
    "parts": Area(_write_parts, _parts),
    "run": Area(_write_run, _run),
    "calibration": Area(_write_calibration, lambda folder: read_calibration(str(folder / "calibration.json"))),
    "checkpoint": Area(_write_checkpoint, _checkpoint),
    "settings": Area(
        lambda folder: claim(str(folder), SETTINGS, "output"),
        lambda folder: check_claim(str(folder), SETTINGS, "output"),
    ),
    "grouping": Area(lambda folder: sfxl._write_cache(str(folder / "sfxl.parquet"), _places()), _grouping),
    "dense features": Area(
        lambda folder: shutil.copytree(BEFORE_SEALS / "run" / "dense", folder, dirs_exist_ok=True), _dense
    ),
}


def damage(file: Path, files: list[Path], rng: random.Random) -> str:
    """Damage a file; returns how."""
    data = file.read_bytes()
    others = [other for other in files if other != file and other.suffix == file.suffix]
    kind = rng.choice(["bit", "zeros", "end", "hole", "more"] + (["swap"] if others else []))
    first = rng.randrange(max(1, len(data)))
    stop = min(len(data), first + rng.choice((1, 8, 100, 1000)))
    if kind == "bit":
        bits = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 5))):
            bits[rng.randrange(len(bits))] ^= 1 << rng.randrange(8)
        file.write_bytes(bits)
    elif kind == "swap":
        file.write_bytes(rng.choice(others).read_bytes())
    else:
        parts_of = {"zeros": bytes(stop - first), "hole": b"", "more": data[first:stop] * 2}
        file.write_bytes(data[:first] if kind == "end" else data[:first] + parts_of[kind] + data[stop:])
    return kind


@pytest.mark.slow
@pytest.mark.parametrize("num_files", [30, pytest.param(2000, marks=[pytest.mark.soak, pytest.mark.timeout(1500)])])
@pytest.mark.parametrize("name", AREAS)
def test_a_damaged_file_never_gives_another_answer(
    tmp_path: Path, name: str, num_files: int, capsys: pytest.CaptureFixture[str]
) -> None:
    area, whole, folder, rng = AREAS[name], tmp_path / "whole", tmp_path / "damaged", random.Random(name)
    area.write(whole)
    outcomes: Counter[str] = Counter()
    shutil.copytree(whole, folder)
    expected = area.read(folder)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    for number in range(num_files):
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        file = folder / rng.choice(files)
        kind = damage(file, [folder / other for other in files], rng)
        answer, line = None, ""
        try:
            answer = area.read(folder)
        except (UserError, IncompleteRunError, StorageError) as error:
            line = str(error)
        assert "\n" not in line
        assert line or answer in (MADE_ANEW, expected), f"{number}: {file.name} {kind}: another answer"
        outcomes["one line" if line else MADE_ANEW if isinstance(answer, str) else "the same answer"] += 1
    capsys.readouterr()
    with capsys.disabled():
        if num_files > 100:
            print(f"\n{name}: {num_files} damaged files: {dict(outcomes)}")
    assert outcomes.total() == num_files
