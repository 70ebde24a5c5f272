"""What a run checks before it loads weights or starts Ray, and what it says when it stops."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from PIL import Image
from ray.exceptions import RayTaskError

from pairvpr.boundary import exit_code_of
from pairvpr.config.benchmark_schema import FoldersConfig, PositionSource
from pairvpr.config.compose import load_evaluations
from pairvpr.config.schema import (
    BuildIndexConfig,
    EvaluateConfig,
    IndexConfig,
    OpenIndexConfig,
    QueryConfig,
)
from pairvpr.data import sealed, storage
from pairvpr.data.claim import claim
from pairvpr.data.manifest import folder_manifest
from pairvpr.errors import IncompleteRunError, UserError
from pairvpr.evaluation.confidence import Calibration, Judge
from pairvpr.index import make
from pairvpr.index.generations import StoredFile, commit
from pairvpr.models.weights import untrained_state
from pairvpr.toy.benchmarks import write_sfxl_test
from ray_jobs import evaluate as steps
from ray_jobs.build_index import build_index
from ray_jobs.evaluate import evaluate, prepare
from ray_jobs.query import query
from ray_jobs.run import Run
from tests.support.flaky import FlakyFileSystem
from tests.support.index import FLAT, PLENTY_BYTES, describe_rows, write_index
from tests.support.small import small_evaluate_config, small_model_config

WEIGHTS_SHA256 = "weights_sha256"


@pytest.fixture(autouse=True)
def _store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A store that forgets its faults, and retries that do not wait."""
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.0)
    FlakyFileSystem.reset()
    yield
    FlakyFileSystem.reset()


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting Ray fails the test."""
    monkeypatch.setattr(steps, "ray_session", lambda _: pytest.fail("Ray was started"))


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading weights fails the test."""
    monkeypatch.setattr(steps, "load_weights", lambda *_: pytest.fail("weights were loaded"))


@pytest.fixture
def config(tmp_path: Path) -> EvaluateConfig:
    """Three photos, one query, an index directory of its own."""
    for name in ("database/a.png", "database/b.png", "database/c.png", "queries/q.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (30, 30)).save(tmp_path / name)
    benchmark = FoldersConfig(name="folders", database=f"{tmp_path}/database", queries=f"{tmp_path}/queries")
    shared = small_evaluate_config(f"{tmp_path}/out")
    return replace(shared, benchmark=benchmark, index=IndexConfig(path=f"{tmp_path}/index"))


def finish_index(run: Run, **changes: Any) -> None:
    """An index of the run's database as `build_index` leaves it, and `changes` to its manifest.

    `photos=4` makes it one of so many photos, `cut_at=2` one of two shards.
    """
    images, dim = run.benchmark.database, run.config.model.descriptor_dim
    claim(run.index, run.index_settings(), "index.path")
    rows = np.eye(len(images), dim, dtype=np.float32)
    describe_rows(run.index, images, rows, [])
    assert run.weights is not None
    made_by = {"name": "small", WEIGHTS_SHA256: run.weights.sha256}
    draft = make.first_generation(run.index, images, 1, made_by, dim)
    manifest = make.next_generation(run.index, draft, FLAT, PLENTY_BYTES, make.LocalRunner())
    (table,), (shard,) = manifest.images, manifest.shards
    if photos := changes.pop("photos", None):
        changes |= {
            "num_images": photos,
            "images": [replace(table, count=photos)],
            "shards": [replace(shard, count=photos)],
        }
    if cut_at := changes.pop("cut_at", None):
        first = replace(shard, count=cut_at, num_rows=cut_at)
        rest = shard.count - cut_at
        changes["shards"] = [first, replace(shard, first_id=cut_at, count=rest, num_rows=rest)]
    commit(run.index, replace(manifest, **changes))


def mistake(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("has_settings", [True, False])
def test_a_finished_index_is_taken(config: EvaluateConfig, has_settings: bool) -> None:
    (run,) = prepare([config])
    finish_index(run)
    if not has_settings:
        storage.remove_file(storage.join(run.index, "settings.json"))
    assert prepare([config])[0].settings() == run.settings()


def test_scaled_photos_are_another_index_and_settings_without_the_key_mean_whole_ones(config: EvaluateConfig) -> None:
    (run,) = prepare([config])
    assert "scaled_decoding" not in run.settings()["model"]  # as it was before there was such a setting
    finish_index(run)
    scaled = replace(config, model=replace(config.model, scaled_decoding=True))
    assert "model.scaled_decoding absent there, True now" in mistake(lambda: prepare([scaled]))
    storage.remove_tree(run.index)
    (run,) = prepare([scaled])
    finish_index(run)
    assert prepare([scaled])[0].settings() == run.settings()
    assert "model.scaled_decoding True there, absent now" in mistake(lambda: prepare([config]))
    queries = QueryConfig(
        queries=f"{run.output}/../queries",
        output=f"{run.output}/answers",
        model=config.model,
        describe=config.describe,
        index=OpenIndexConfig(path=run.index),
        rerank=config.rerank,
    )
    assert "model.scaled_decoding True there, absent now" in mistake(lambda: query(queries))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"name": "other", WEIGHTS_SHA256: "cd" * 32}}, "was made with model other and weights cdcdcdcdcdcd"),
        ({"num_images": 4}, "images do not cover the ids 0 to 3 in order"),
        ({"photos": 4}, "num_images 4 there, 3 now"),
        ({"descriptor_dim": 8}, "descriptor_dim 8 there, 16 now"),
        ({"images_root": "/elsewhere"}, "images_root /elsewhere there"),
        ({"shards": []}, "shards do not cover the ids 0 to 2 in order"),
        ({"cut_at": 2}, "num_shards 2 there, 1 now"),
        ({"removed": [StoredFile(path="x", bytes=1, sha256="0" * 64)]}, "generation's updates 1 there, 0 now"),
    ],
)
def test_a_finished_index_without_settings_is_checked(
    config: EvaluateConfig, changes: dict[str, Any], words: str
) -> None:
    (run,) = prepare([config])
    finish_index(run, **changes)
    storage.remove_file(storage.join(run.index, "settings.json"))
    message = mistake(lambda: prepare([config]))
    assert words in message
    assert run.index in message


def test_a_finished_index_of_photos_with_other_names_is_refused(config: EvaluateConfig, tmp_path: Path) -> None:
    (run,) = prepare([config])
    finish_index(run)
    storage.remove_file(storage.join(run.index, "settings.json"))
    (tmp_path / "database" / "c.png").rename(tmp_path / "database" / "d.png")
    assert "paths_sha256" in mistake(lambda: prepare([config]))


def test_photos_that_have_moved_are_another_run(config: EvaluateConfig, tmp_path: Path) -> None:
    """Also where no positive changes: the index keeps positions. Settings of earlier versions don't say them."""

    def placed(east_m: int) -> EvaluateConfig:
        for part, names in (("database", "abc"), ("queries", "q")):
            rows = [f"{name}.png,{east_m if name == 'c' else 100},200" for name in names]
            (tmp_path / f"{part}.csv").write_text("\n".join(["path,utm_east,utm_north", *rows]))
        assert isinstance(config.benchmark, FoldersConfig)
        tables = {"database_table": f"{tmp_path}/database.csv", "queries_table": f"{tmp_path}/queries.csv"}
        return replace(config, benchmark=replace(config.benchmark, positions=PositionSource.table, **tables))

    (run,) = prepare([placed(100_000)])
    finish_index(run)
    claim(run.output, run.settings(), "output")
    assert prepare([placed(100_000)])[0].settings() == run.settings()
    moved = placed(200_000)
    assert "out was made with different settings: positions_sha256" in mistake(lambda: prepare([moved]))
    other = replace(moved, output=f"{tmp_path}/other")
    assert "index was made with different settings: positions_sha256" in mistake(lambda: prepare([other]))
    for directory in (run.output, run.index):
        settings = sealed.read_json(f"{directory}/settings.json", "")
        assert settings is not None
        storage.remove_file(f"{directory}/settings.json")
        claim(directory, {name: its for name, its in settings.items() if name != "positions_sha256"}, "k")
    prepare([moved])


def test_what_is_reported_does_not_keep_a_run_from_being_resumed(config: EvaluateConfig) -> None:
    (run,) = prepare([config])
    claim(run.output, run.settings(), "output")
    (again,) = prepare([replace(config, rerank=replace(config.rerank, report_candidates=[1, 3]))])
    assert again.settings() == run.settings()


def calibrated(config: EvaluateConfig, folder: Path, **settings: Any) -> EvaluateConfig:
    """The run with a calibration file of its own network; `settings` of the re-ranking."""
    model = prepare([config])[0].index_settings()["model"]
    found = Calibration(
        benchmark="made_up",
        num_queries=50,
        num_candidates=10,
        model=model,
        temperature=1.5,
        midpoint=0.25,
        round_size=3,
        stop_margin=0.75,
    )
    storage.write_json(f"{folder}/calibration.json", found.content())
    return replace(config, rerank=replace(config.rerank, calibration=f"{folder}/calibration.json", **settings))


def change(file: str, **changes: Any) -> None:
    storage.write_json(file, storage.read_json(file) | changes)


def test_a_calibration_is_part_of_the_settings_and_its_absence_is_not(config: EvaluateConfig, tmp_path: Path) -> None:
    """An output directory of before is resumed; with another calibration, or none, it is another run."""
    (plain,) = prepare([config])
    assert set(plain.settings()["rerank"]) == {
        *("num_candidates", "batch_size", "queries_per_unit", "num_threads_per_actor", "scoring")
    }
    (partly,) = prepare([replace(config, rerank=replace(config.rerank, second_direction=3))])
    assert partly.settings()["rerank"] == plain.settings()["rerank"] | {"second_direction": 3}
    asked = calibrated(config, tmp_path, adaptive=True, not_in_map_below=0.5)
    (run,) = prepare([asked])
    used = {"temperature": 1.5, "midpoint": 0.25, "not_in_map_below": 0.5, "stop_margin": 0.75}
    assert run.settings()["rerank"] == plain.settings()["rerank"] | used
    assert (run.stop_margin, run.judge) == (0.75, Judge(1.5, 0.25, 0.5))
    (sure,) = prepare([calibrated(config, tmp_path)])
    assert sure.settings()["rerank"] == plain.settings()["rerank"] | {"temperature": 1.5, "midpoint": 0.25}
    assert sure.stop_margin is None

    claim(run.output, run.settings(), "output")
    prepare([asked])
    assert "rerank.stop_margin 0.75 there, absent now" in mistake(lambda: prepare([config]))
    change(f"{tmp_path}/calibration.json", temperature=2.0)
    assert "rerank.temperature 1.5 there, 2.0 now" in mistake(lambda: prepare([asked]))


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("changes", "words", "before_weights"),
    [
        ({"round_size": 16}, "is for rounds of 16 pairs, but rerank.batch_size is 3; expected the same", True),
        ({"stop_margin": None}, "has no stop margin", True),
        ({"format_version": 9}, "format version 9; expected 1", True),
        ({"model": {"name": "vitb"}}, "model.descriptor_dim absent there, 16 now; ", True),
        ({"first_stage": {"file_width": 8448}}, "another first stage: first_stage.file_width 8448 there, absent", True),
        ({"first_stage": {"reduced_to": 4}}, "another first stage: first_stage.reduced_to 4 there, absent now", True),
        ({"weights": "cd" * 32}, f"made for another network: model.{WEIGHTS_SHA256} cdcd", False),
    ],
)
def test_a_calibration_that_does_not_fit_is_refused(
    config: EvaluateConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    words: str,
    before_weights: bool,
) -> None:
    asked = calibrated(config, tmp_path, adaptive=True)
    if "weights" in changes:
        model = storage.read_json(f"{tmp_path}/calibration.json")["model"]
        changes = {"model": model | {WEIGHTS_SHA256: changes["weights"]}}
    change(f"{tmp_path}/calibration.json", **changes)
    write_index(
        f"{tmp_path}/answered", [], np.eye(3, 16, dtype=np.float32), images=folder_manifest(f"{tmp_path}/database", "")
    )
    question = QueryConfig(
        queries=f"{tmp_path}/queries",
        output=f"{tmp_path}/answers",
        model=config.model,
        index=OpenIndexConfig(path=f"{tmp_path}/answered"),
        rerank=asked.rerank,
    )
    if before_weights:
        monkeypatch.setattr(steps, "load_weights", lambda *_: pytest.fail("weights were loaded"))
        assert words in mistake(lambda: query(question))
    assert words in mistake(lambda: evaluate([asked]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("edited", ["positions", "weights"])
def test_an_edited_input_is_another_run(config: EvaluateConfig, tmp_path: Path, edited: str) -> None:
    """Under its own name; as it was before, it is the same run again."""
    tables = {
        "database": "a.png,500000,4180000\nb.png,500100,4180000\nc.png,500200,4180000\n",
        "queries": "q.png,500010,4180000\n",
    }
    for part, rows in tables.items():
        (tmp_path / f"{part}.csv").write_text(f"path,utm_east,utm_north\n{rows}")
    state = untrained_state(config.model)
    torch.save(state, tmp_path / "w.pth")
    benchmark = FoldersConfig(
        name="folders",
        database=f"{tmp_path}/database",
        queries=f"{tmp_path}/queries",
        radius_m=25.0,
        positions=PositionSource.table,
        database_table=f"{tmp_path}/database.csv",
        queries_table=f"{tmp_path}/queries.csv",
    )
    asked = replace(config, benchmark=benchmark, model=replace(config.model, weights=f"{tmp_path}/w.pth"))
    (run,) = prepare([asked])
    claim(run.output, run.settings(), "output")
    file, words = {
        "positions": (tmp_path / "database.csv", "benchmark.positives_sha256 "),
        "weights": (tmp_path / "w.pth", f"model.{WEIGHTS_SHA256} "),
    }[edited]
    before = file.read_bytes()
    if edited == "positions":
        file.write_bytes(before.replace(b"500100", b"500012"))
    else:
        torch.save({name: tensor + 1 for name, tensor in state.items()}, file)
    assert words in mistake(lambda: prepare([asked]))
    file.write_bytes(before)
    prepare([asked])


def test_another_ground_truth_is_another_run(config: EvaluateConfig, tmp_path: Path) -> None:
    def run_with(row: str) -> EvaluateConfig:
        (tmp_path / "positives.csv").write_text(f"query,database\n{row}\n")
        return replace(config, benchmark=replace(config.benchmark, positives=f"{tmp_path}/positives.csv"))

    (run,) = prepare([run_with("q.png,a.png")])
    claim(run.output, run.settings(), "output")
    assert "benchmark.positives_sha256 " in mistake(lambda: prepare([run_with("q.png,b.png")]))
    prepare([run_with("q.png,a.png")])


def test_benchmarks_of_one_database_share_its_list_and_its_index(tmp_path: Path) -> None:
    write_sfxl_test(f"{tmp_path}/sf_xl", num_places=2)
    runs = prepare(
        load_evaluations(
            [
                "experiment=sfxl_speed",
                "model=tiny",
                "model.weights=null",
                f"datasets_root={tmp_path}",
                f"output={tmp_path}/out",
            ]
        )
    )
    assert [run.output for run in runs] == [
        f"{tmp_path}/out/sfxl_{name}" for name in ("v1", "v2", "night", "occlusion")
    ]
    assert {run.index for run in runs} == {f"{tmp_path}/out/index"}
    assert len({id(run.benchmark.database) for run in runs}) == 1
    assert len({run.benchmark.queries.paths_sha256 for run in runs}) == 4
    assert all(run.index_settings() == runs[0].index_settings() for run in runs)


def test_other_settings_are_found_before_weights_are_loaded(
    config: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run,) = prepare([config])
    claim(run.output, run.settings(), "output")
    finish_index(run)
    asked = QueryConfig(
        queries=f"{tmp_path}/queries",
        output=f"{tmp_path}/answers",
        model=config.model,
        index=OpenIndexConfig(path=run.index),
    )
    claim(asked.output, {"model": {"precision": "fp16"}}, "output")
    indexed = BuildIndexConfig(database=f"{tmp_path}/queries", output=run.index, model=config.model)
    monkeypatch.setattr(steps, "load_weights", lambda *_: pytest.fail("weights were loaded"))
    assert "rerank.batch_size 3 there, 4 now" in mistake(
        lambda: prepare([replace(config, rerank=replace(config.rerank, batch_size=4))])
    )
    assert "database.root" in mistake(lambda: build_index(indexed))
    assert "model.precision fp16 there, fp32 now" in mistake(lambda: query(asked))


@pytest.mark.usefixtures("no_ray")
def test_other_weights_are_still_refused(config: EvaluateConfig) -> None:
    (run,) = prepare([config])
    settings = run.settings()
    claim(run.output, settings | {"model": settings["model"] | {WEIGHTS_SHA256: "cd" * 32}}, "output")
    assert f"model.{WEIGHTS_SHA256} cdcd" in mistake(lambda: evaluate([config]))


@pytest.mark.usefixtures("no_ray", "no_weights")
@pytest.mark.parametrize(
    ("gone", "words"),
    [("database", "its photos were in"), ("index/images.parquet", "images.parquet is missing; build the index again")],
)
def test_queries_need_the_photos_of_the_index(config: EvaluateConfig, tmp_path: Path, gone: str, words: str) -> None:
    database = folder_manifest(f"{tmp_path}/database", "database")
    write_index(f"{tmp_path}/index", [], np.eye(3, 16, dtype=np.float32), images=database)
    target = tmp_path / gone
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    asked = QueryConfig(
        queries=f"{tmp_path}/queries", output=f"{tmp_path}/answers", index=OpenIndexConfig(path=f"{tmp_path}/index")
    )
    message = mistake(lambda: query(asked))
    assert words in message
    assert f"{tmp_path}/{'index' if 'parquet' in gone else 'database'}" in message


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("job", ["evaluate", "build"])
def test_a_bucket_that_is_not_there_is_found_before_ray_starts(
    config: EvaluateConfig, tmp_path: Path, job: str
) -> None:
    FlakyFileSystem.error = FileNotFoundError("The specified bucket does not exist")
    FlakyFileSystem.failures_left["pipe_file"] = 99
    output = "flaky://bucket/out"
    if job == "evaluate":
        message = mistake(lambda: evaluate([replace(config, output=output)]))
    else:
        wanted = BuildIndexConfig(database=f"{tmp_path}/database", output=output, model=small_model_config())
        message = mistake(lambda: build_index(wanted))
    assert message == f"output={output}: can't be written: The specified bucket does not exist"


@pytest.mark.parametrize("from_a_task", [True, False])
def test_a_store_that_fails_amid_a_run_is_one_line(capsys: pytest.CaptureFixture[str], from_a_task: bool) -> None:
    error: Exception = storage.StorageError("s3://bucket/part: OSError: 503 slow down")
    if from_a_task:
        error = RayTaskError("build", "Traceback ...\n many lines", error).as_instanceof_cause()

    def work() -> None:
        raise error

    assert exit_code_of(work) == 1
    line, _, log = capsys.readouterr().err.partition(" (full text: ")
    assert line == "error: s3://bucket/part: OSError: 503 slow down; finished work is kept"
    Path(log.rstrip(")\n")).unlink()


def test_a_benchmark_that_fails_does_not_keep_the_next_from_running(
    config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered: list[str] = []

    def answer(run: Run, _: object, __: object) -> dict[str, Any]:
        answered.append(run.benchmark.name)
        if run.benchmark.name == "first":
            raise IncompleteRunError("unit 3 failed")
        return {}

    monkeypatch.setattr(steps, "ray_session", lambda _: nullcontext())
    monkeypatch.setattr(ray, "put", lambda value: value)
    monkeypatch.setattr(steps, "ensure_index", lambda *_: None)
    monkeypatch.setattr(steps, "answer", answer)
    configs = [replace(config, benchmark=replace(config.benchmark, name=name)) for name in ("first", "second")]
    with pytest.raises(IncompleteRunError, match=r"^first: unit 3 failed$"):
        evaluate(configs)
    assert answered == ["first", "second"]
