"""Runs of both stages without Ray: equal, resumed, on several ranks, stopped by a loss that is no number."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pairvpr.config.compose import load
from pairvpr.config.train_schema import TrainStageOneConfig, TrainStageTwoConfig
from pairvpr.data import storage
from pairvpr.errors import UserError
from pairvpr.models.weights import load_weights
from pairvpr.training import checkpoint
from pairvpr.training.context import TrainContext
from pairvpr.training.export import export_weights
from pairvpr.training.loop import NotFiniteError
from pairvpr.training.metrics_log import read_metrics
from tests.support.flaky import FlakyFileSystem
from tests.support.training import STAGES, arguments, draw_training_set, losses, train_all_on_ranks, train_here

pytestmark = pytest.mark.slow

NUM_STEPS = 10


@pytest.fixture(autouse=True, scope="module")
def _threads() -> Iterator[None]:
    """The runs set torch's threads; other tests get theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos to train on."""
    folder = tmp_path_factory.mktemp("training")
    draw_training_set(folder)
    return folder


@pytest.fixture(scope="module", params=STAGES)
def stage(request: pytest.FixtureRequest) -> int:
    """Both."""
    return request.param


@pytest.fixture(scope="module")
def undisturbed(root: Path, stage: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a whole run."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    train_here(stage, arguments(stage, root, output))
    return output


def _state(output: Path, stage: int) -> dict[str, torch.Tensor]:
    return dict(checkpoint.load(str(output / "checkpoints" / "last.pt"), stage, "output").model)


def test_a_run_learns_and_leaves_its_files(undisturbed: Path, stage: int) -> None:
    rows = read_metrics(str(undisturbed))
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    assert [row["epoch"] for row in rows] == [0] * 5 + [1] * 5
    assert np.mean([row["loss"] for row in rows[-3:]]) < np.mean([row["loss"] for row in rows[:3]])
    names = sorted(file.name for file in (undisturbed / "checkpoints").iterdir())
    assert names == ["epoch_0001.pt", "epoch_0002.pt", "last.pt"]
    assert list((undisturbed / "tensorboard").iterdir())
    position = checkpoint.load(str(undisturbed / "checkpoints" / "last.pt"), stage, "output").position
    assert position == checkpoint.Position(epoch=2, batch=0, step=NUM_STEPS)


def test_two_equal_runs_are_equal(undisturbed: Path, root: Path, stage: int, tmp_path: Path) -> None:
    rows = train_here(stage, arguments(stage, root, tmp_path / "out"))
    assert losses(rows) == losses(read_metrics(str(undisturbed)))
    again, first = _state(tmp_path / "out", stage), _state(undisturbed, stage)
    assert all(torch.equal(again[name], first[name]) for name in first)
    other_seed = train_here(stage, arguments(stage, root, tmp_path / "other", "train.seed=1", "train.max_steps=1"))
    assert other_seed[0]["loss"] != rows[0]["loss"]


def test_two_equal_runs_of_two_threads_are_equal(root: Path, tmp_path: Path) -> None:
    """Photos that several triplets share add up their gradients; threads must not race for that."""
    more = ("train.num_threads_per_worker=2", "train.global_batch_size=16", "train.epochs=3")
    states = []
    for name in ("first", "second", "third"):
        train_here(2, arguments(2, root, tmp_path / name, *more))
        states.append(_state(tmp_path / name, 2))
    for state in states[1:]:
        assert all(torch.equal(state[name], states[0][name]) for name in state)


@pytest.mark.parametrize("stop", [3, 5])
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(
    undisturbed: Path, root: Path, stage: int, tmp_path: Path, stop: int
) -> None:
    line = arguments(stage, root, tmp_path / "out")
    assert len(train_here(stage, [*line, f"train.max_steps={stop}"])) == stop
    assert losses(train_here(stage, line)) == losses(read_metrics(str(undisturbed)))
    resumed, first = _state(tmp_path / "out", stage), _state(undisturbed, stage)
    assert all(torch.equal(resumed[name], first[name]) for name in first)


def test_a_checkpoint_comes_before_a_machine_goes(undisturbed: Path, root: Path, stage: int, tmp_path: Path) -> None:
    line = arguments(stage, root, tmp_path / "out")
    notices = iter([False, True, False])  # the fourth answer is an error, as if the process died

    def loses_a_machine() -> bool:
        return next(notices)

    with pytest.raises(StopIteration):
        train_here(stage, line, context_type=partial(TrainContext, loses_a_machine=loses_a_machine))
    last = checkpoint.load(str(tmp_path / "out" / "checkpoints" / "last.pt"), stage, "output")
    assert last.position == checkpoint.Position(epoch=0, batch=2, step=2)
    assert losses(train_here(stage, line)) == losses(read_metrics(str(undisturbed)))


def test_rows_of_steps_done_again_are_dropped(undisturbed: Path, root: Path, stage: int, tmp_path: Path) -> None:
    """Killed between the log and the checkpoint: the log is ahead of what the run resumes from."""
    line = arguments(stage, root, tmp_path / "out")
    rows = train_here(stage, [*line, "train.max_steps=3"])
    ahead = [*rows, rows[-1] | {"step": 4, "loss": -1.0}]
    lines = "".join(f"{json.dumps(row)}\n" for row in ahead)
    storage.write_bytes(str(tmp_path / "out" / "metrics.jsonl"), lines.encode())
    assert losses(train_here(stage, line)) == losses(read_metrics(str(undisturbed)))


@pytest.fixture(scope="module")
def on_ranks(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[int, Path]]:
    """Gives the outputs of whole runs of both stages, on so many ranks."""

    @cache
    def outputs_of(world_size: int) -> dict[int, Path]:
        folder = tmp_path_factory.mktemp("ranks")
        outputs = {stage: folder / f"stage_{stage}" for stage in STAGES}
        train_all_on_ranks([(stage, arguments(stage, root, outputs[stage])) for stage in STAGES], world_size, folder)
        return outputs

    return outputs_of


@pytest.mark.parametrize("world_size", [2, 3])
def test_more_ranks_give_the_same_losses(
    undisturbed: Path, on_ranks: Callable[[int], dict[int, Path]], stage: int, world_size: int
) -> None:
    """Also where the ranks do not divide the batch of 4."""
    ours, expected = read_metrics(str(on_ranks(world_size)[stage])), read_metrics(str(undisturbed))
    assert len(ours) == len(expected)
    for row, truth in zip(ours, expected, strict=True):
        assert row["loss"] == pytest.approx(truth["loss"], rel=2e-3)
    assert ours[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-5)


def test_accumulation_and_recomputation_change_nothing(root: Path, tmp_path: Path) -> None:
    plain = train_here(1, arguments(1, root, tmp_path / "plain"))
    for name, more in (("parts", "train.accumulation_steps=3"), ("less", "train.activation_checkpointing=true")):
        rows = train_here(1, arguments(1, root, tmp_path / name, more))
        for row, truth in zip(rows, plain, strict=True):
            assert row["loss"] == pytest.approx(truth["loss"], rel=1e-4)


def test_clipping_limits_the_gradient(undisturbed: Path, root: Path, stage: int, tmp_path: Path) -> None:
    rows = train_here(stage, arguments(stage, root, tmp_path / "out", "train.clip_grad=0.001", "train.max_steps=4"))
    assert all(row["gradient_norm"] > 0.001 for row in rows)  # before clipping
    assert rows[0]["loss"] == read_metrics(str(undisturbed))[0]["loss"]
    assert rows[3]["loss"] != read_metrics(str(undisturbed))[3]["loss"]


def test_loader_processes_change_nothing(undisturbed: Path, root: Path, stage: int, tmp_path: Path) -> None:
    rows = train_here(stage, arguments(stage, root, tmp_path / "out", "train.loader_processes=2"))
    assert losses(rows) == losses(read_metrics(str(undisturbed)))


def test_a_loss_that_is_no_number_stops_the_run(root: Path, stage: int, tmp_path: Path) -> None:
    line = arguments(stage, root, tmp_path / "out", "train.checkpoint_every_steps=2")
    train_here(stage, [*line, "train.max_steps=2"])
    last = tmp_path / "out" / "checkpoints" / "last.pt"
    before = last.read_bytes()
    with pytest.raises(
        NotFiniteError, match=r"loss of step \d+ is not finite \(lr .*(Bangkok|Boston)_.*jpg"
    ) as stopped:
        train_here(stage, [*line, "train.lr=1e30"])
    assert "\n" not in str(stopped.value)
    assert last.stat().st_size == len(before)
    kept = checkpoint.load(str(last), stage, "output")
    assert all(tensor.isfinite().all() for tensor in kept.model.values())


def test_broken_photos_are_counted(root: Path, stage: int, tmp_path: Path) -> None:
    own = tmp_path / "root"
    draw_training_set(own)
    broken = sorted((own / "gsv_cities" / "Images" / "Boston").iterdir())
    for path in broken[::5]:  # one of five photos of each place
        path.write_bytes(path.read_bytes()[:200])
    rows = train_here(stage, arguments(stage, own, tmp_path / "out"))
    redrawn = [row["redrawn_photos"] for row in rows]
    assert redrawn == sorted(redrawn)  # the run's, so far
    assert redrawn[-1] > redrawn[0]
    assert rows[-1]["skipped_places"] == 0
    assert all(np.isfinite(row["loss"]) for row in rows)

    line = arguments(stage, own, tmp_path / "seldom", "train.log_every_steps=4", "train.checkpoint_every_steps=3")
    train_here(stage, [*line, "train.max_steps=3"])
    seldom = {row["step"]: row for row in train_here(stage, line)}
    assert sorted(seldom) == [3, 4, 8, 10]
    assert all(row["redrawn_photos"] == redrawn[step - 1] for step, row in seldom.items())


@pytest.mark.parametrize("num_processes", [0, 1])
def test_a_set_without_readable_photos_is_one_line(root: Path, stage: int, tmp_path: Path, num_processes: int) -> None:
    own = tmp_path / "root"
    draw_training_set(own)
    for path in (own / "gsv_cities" / "Images").rglob("*.jpg"):
        path.write_bytes(b"")
    line = arguments(stage, own, tmp_path / "out", f"train.loader_processes={num_processes}")
    with pytest.raises(UserError, match="gsv_cities: none of 20 places") as stopped:
        train_here(stage, line)
    assert "\n" not in str(stopped.value)


def test_a_run_on_a_store(undisturbed: Path, root: Path, stage: int) -> None:
    """Output on a URL whose store answers 503 now and then."""
    FlakyFileSystem.reset()
    line = [word for word in arguments(stage, root, Path("unused")) if not word.startswith("output=")]
    line.append("output=flaky://runs/out")
    train_here(stage, [*line, "train.max_steps=3"])
    FlakyFileSystem.failures_left.update({"pipe_file": 1, "put_file": 1, "open": 1, "cat_file": 1})
    assert losses(train_here(stage, line)) == losses(read_metrics(str(undisturbed)))
    FlakyFileSystem.reset()


def test_the_last_checkpoint_is_kept_and_its_step_is_known(root: Path, stage: int, tmp_path: Path) -> None:
    assert checkpoint.steps_done(str(tmp_path / "out")) == 0
    train_here(stage, arguments(stage, root, tmp_path / "out", "train.max_steps=7", "train.keep_every_epochs=5"))
    names = sorted(file.name for file in (tmp_path / "out" / "checkpoints").iterdir())
    assert names == ["last.pt", "step_00000007.pt"]
    (tmp_path / "out" / "checkpoints" / "last.json").write_text('{"step": 5}')  # older versions wrote it afterwards
    assert checkpoint.steps_done(str(tmp_path / "out")) == 7


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_exported_weights_are_what_inference_loads(root: Path, tmp_path: Path, name: str) -> None:
    line = arguments(2, root, tmp_path / "out", "train.max_steps=1")
    train_here(2, line)
    last, exported = str(tmp_path / "out" / "checkpoints" / "last.pt"), str(tmp_path / name)
    config = load(TrainStageTwoConfig, line).model
    export_weights(last, exported, half=False)
    config.weights = exported
    state = _state(tmp_path / "out", 2)
    for key, array in load_weights(config).arrays.items():
        np.testing.assert_array_equal(array, state[key].numpy())
    export_weights(last, exported, half=True)
    assert Path(exported).stat().st_size < 0.6 * sum(4 * tensor.numel() for tensor in state.values()) + 65536
    load_weights(config)


def test_checkpoints_of_the_other_stage_are_refused(undisturbed: Path, stage: int, tmp_path: Path) -> None:
    url = str(undisturbed / "checkpoints" / "last.pt")
    with pytest.raises(UserError, match=f"it is a checkpoint of stage {stage}; expected one of stage {3 - stage}"):
        checkpoint.load(url, 3 - stage, "output")
    (tmp_path / "last.pt").write_bytes(Path(url).read_bytes()[:1000])
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoint.load(str(tmp_path / "last.pt"), stage, "output")
    torch.save({"format_version": checkpoint.FORMAT_VERSION, "stage": stage}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="an incomplete checkpoint, without counts, model, optimizer"):
        checkpoint.load(str(tmp_path / "last.pt"), stage, "output")
    torch.save({"model": {}}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="weights alone"):
        checkpoint.load(str(tmp_path / "weights.pt"), stage, "output")


def test_stage_two_goes_on_from_stage_one(root: Path, tmp_path: Path) -> None:
    train_here(1, arguments(1, root, tmp_path / "one", "train.max_steps=2"))
    start = tmp_path / "one" / "checkpoints" / "last.pt"
    rows = train_here(2, arguments(2, root, tmp_path / "two", f"train.start={start}", "train.max_steps=1"))
    fresh = train_here(2, arguments(2, root, tmp_path / "fresh", "train.max_steps=1"))
    assert rows[0]["loss"] != fresh[0]["loss"]


class _OneOfTwo(TrainContext):
    """A rank whose neighbour sees the checkpoint of step 3."""

    def gather(self, value: Any) -> list[Any]:
        return [value, 3]


def test_ranks_that_see_different_checkpoints_do_not_train(root: Path, tmp_path: Path) -> None:
    line = arguments(2, root, tmp_path / "out")
    with pytest.raises(UserError, match=r"workers see different checkpoints there \(steps \[None, 3\]\)"):
        train_here(2, line, context_type=_OneOfTwo)


def test_schedules_reach_their_ends(root: Path, tmp_path: Path) -> None:
    config = load(TrainStageOneConfig, arguments(1, root, tmp_path / "out"))
    rows = train_here(1, arguments(1, root, tmp_path / "out"))
    assert rows[0]["lr"] == 0.0
    assert max(row["lr"] for row in rows) == pytest.approx(config.train.lr * (4 / 1024) ** 0.5)
    decays = [row["weight_decay"] for row in rows]
    assert decays == sorted(decays)
    assert decays[0] == pytest.approx(config.train.weight_decay)
