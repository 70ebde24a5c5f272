"""What is wrong with a training is said before Ray starts, a GPU is touched or a file is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from pairvpr.config.compose import load
from pairvpr.config.train_schema import StageOneConfig, TrainStageOneConfig, TrainStageTwoConfig
from pairvpr.data import sealed, storage
from pairvpr.data.claim import check_claim, claim
from pairvpr.data.training_sets.read import read_training_sets
from pairvpr.distributed import train_workers
from pairvpr.errors import UserError
from pairvpr.models.weights import untrained_state
from pairvpr.toy.training_sets import write_landmarks
from pairvpr.training.checkpoint import steps_done
from pairvpr.training.start import stage_one_start_weights
from ray_jobs.train_stage_one import train_stage_one
from ray_jobs.train_stage_two import train_stage_two
from tests.support.training import arguments, draw_training_set


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos to train on."""
    folder = tmp_path_factory.mktemp("training")
    draw_training_set(folder)
    return folder


def _refusal(stage: int, root: Path, output: Path, *more: str) -> str:
    line = arguments(stage, root, output, *more)
    with pytest.raises(UserError) as refused:
        train_stage_one(load(TrainStageOneConfig, line)) if stage == 1 else train_stage_two(
            load(TrainStageTwoConfig, line)
        )
    assert not ray.is_initialized()
    assert not output.exists()
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        (1, "train.root=/nowhere", "/nowhere/gsv_cities"),
        (2, "train.root=/nowhere", "/nowhere/gsv_cities"),
        (1, "train.datasets=[sfxl]", "sf_xl"),
        (1, "train.datasets=[gldv2]", "train_clean.csv"),
        (1, "train.datasets=[]", "expected one or more of sfxl, gsv_cities, gldv2"),
        (2, "train.global_batch_size=64", "only 20 places"),
        (2, "train.num_workers=5", "at least one sample for each worker"),
        (1, "train.num_gpus_per_worker=0.5", "train.num_gpus_per_worker=0.5: expected 0, 1 or another whole number"),
        (2, "train.num_gpus_per_worker=-1", "train.num_gpus_per_worker=-1.0: expected 0, 1 or another whole number"),
        (1, "train.start=/nowhere.pth", "train.start=/nowhere.pth: no such file"),
        (2, "train.start=/nowhere.pth", "train.start=/nowhere.pth: no such file"),
        (2, "train.wandb=true", "package wandb is missing"),
        (1, "train.warmup_epochs=2", "expected fewer than train.epochs=2"),
        (2, "model.weights=mine.pth", "training starts from train.start"),
        (1, "model.scaled_decoding=true", "expected model.scaled_decoding=false"),
        (2, "model.scaled_decoding=true", "expected model.scaled_decoding=false"),
        (1, "model.max_megapixels=400", "expected model.max_megapixels=178"),
        (2, "model.compile=true", "expected model.compile=false"),
        (2, "model.max_megapixels=400", "expected model.max_megapixels=178"),
    ],
)
def test_mistakes(root: Path, tmp_path: Path, stage: int, change: str, message: str) -> None:
    assert message in _refusal(stage, root, tmp_path / "out", change)


@pytest.mark.parametrize("given", [{}, {"num_workers": 2}, {"num_gpus_per_worker": 1.0}])
def test_a_cluster_that_shows_nothing_yet_is_not_taken_for_one_without_gpus(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, float]
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", dict)
    with pytest.raises(UserError, match=r"no CPUs until it scales up; expected train\.num_workers and train\.num_gpus"):
        train_workers._scaling(StageOneConfig(root="unused", **given))  # pyright: ignore[reportArgumentType]


def test_weights_of_another_network_are_refused(root: Path, tmp_path: Path) -> None:
    config = load(TrainStageTwoConfig, arguments(2, root, tmp_path / "out", "model.descriptor_dim=64"))
    torch.save(untrained_state(config.model), tmp_path / "two.pth")
    message = _refusal(2, root, tmp_path / "out", f"train.start={tmp_path}/two.pth")
    assert "globalizer.0.weight 64x96 instead of 128x96" in message
    message = _refusal(1, root, tmp_path / "out", f"train.start={tmp_path}/two.pth")
    assert "unexpected: dec_pos_embed_cls, decoder_clstoken" in message


def test_a_csv_without_a_column_is_named(root: Path, tmp_path: Path) -> None:
    frames = tmp_path / "root" / "gsv_cities" / "Dataframes"
    frames.mkdir(parents=True)
    (frames / "Boston.csv").write_text("place_id,year\n1,2010\n")
    message = _refusal(2, tmp_path / "root", tmp_path / "out")
    assert "Boston.csv" in message
    assert "month" in message


def test_a_log_ahead_of_its_checkpoint_is_not_the_end(root: Path, tmp_path: Path) -> None:
    """Killed after the log of the last step, before its checkpoint: the run is not finished."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text('{"step": 10, "loss": 1.0}\n')
    assert steps_done(str(tmp_path / "out")) == 0


def _job(root: Path, output: Path, datasets: list[str]) -> train_workers.Job:
    config = load(TrainStageOneConfig, arguments(1, root, output))
    weights = stage_one_start_weights(config.model, None, 1)
    sets = read_training_sets(datasets, str(root), str(root / "cache"))
    nothing: Any = None
    return train_workers.Job(
        config=config, output=str(output), sets=sets, start=weights, validation=None, make_stage=nothing, num_steps=1
    )


@pytest.fixture
def two_sets(tmp_path: Path) -> Path:
    draw_training_set(tmp_path / "two")
    write_landmarks(str(tmp_path / "two" / "gldv2"), num_places=4, photos_per_place=4, seed=1000)
    return tmp_path / "two"


def _claimed_by(job: train_workers.Job, other: train_workers.Job) -> str:
    """What `job` is told in a directory that `other` has claimed."""
    claim(other.output, other.settings(), "output", [other.earlier_settings()])
    with pytest.raises(UserError) as refused:
        check_claim(job.output, job.settings(), "output", earlier=[job.earlier_settings()])
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_training_does_not_go_on_with_sets_in_another_order(two_sets: Path, tmp_path: Path) -> None:
    names = ["gsv_cities", "gldv2"]
    job, other = (_job(two_sets, tmp_path / "out", order) for order in (names, names[::-1]))
    assert "train.datasets[0].name gsv_cities there, gldv2 now" in _claimed_by(other, job)
    check_claim(job.output, job.settings(), "output", earlier=[job.earlier_settings()])


def test_training_does_not_go_on_with_another_list_of_as_many_places(two_sets: Path, tmp_path: Path) -> None:
    job = _job(two_sets, tmp_path / "out", ["gldv2"])
    table = two_sets / "gldv2" / "train_clean.csv"
    head, *lines = table.read_text().splitlines()
    table.write_text("\n".join([head, *lines[::-1], ""]))
    said = _claimed_by(_job(two_sets, tmp_path / "out", ["gldv2"]), job)
    assert "train.datasets[0].places_sha256" in said
    assert "num_places" not in said


def test_training_goes_on_where_an_earlier_version_stored_numbers_of_places(two_sets: Path, tmp_path: Path) -> None:
    job = _job(two_sets, tmp_path / "out", ["gsv_cities", "gldv2"])
    settings = job.settings()
    settings["train"]["datasets"] = {"gsv_cities": len(job.sets[0]), "gldv2": 4}
    storage.create_exclusively(f"{job.output}/settings.json", sealed.json_bytes(settings))
    earlier = [job.earlier_settings()]
    check_claim(job.output, job.settings(), "output", earlier=earlier)
    claim(job.output, job.settings(), "output", earlier)
    fewer = _job(two_sets, tmp_path / "out", ["gsv_cities"])
    with pytest.raises(UserError, match=r"settings: train\.datasets\.gldv2 4 there, absent now; expected"):
        check_claim(job.output, fewer.settings(), "output", earlier=[fewer.earlier_settings()])


def test_a_validation_without_ground_truth_is_refused(root: Path, tmp_path: Path) -> None:
    photos = root / "gsv_cities" / "Images" / "Boston"
    message = _refusal(
        2,
        root,
        tmp_path / "out",
        "train.validation=folders",
        f"train.validation.database={photos}",
        f"train.validation.queries={photos}",
    )
    assert "no ground truth" in message
