"""Every job as a small run that a test may disturb: its command line, and what all of its runs have in common."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from pairvpr.training import checkpoint
from pairvpr.training.metrics_log import read_metrics
from tests.support import finished, training
from tests.support.runs import SMALL_NETWORK, arguments, draw_city
from tests.unit import test_calibrate

DESCRIBE = (*SMALL_NETWORK, "describe.batch_size=4", "describe.num_threads_per_actor=1")
MEASURED_BY_PLAN = ("calibration", "images_per_s", "hours", "nodes", "problems", "seal")


def _nothing(_: Path) -> None:
    """An output that needs nothing beforehand."""


@dataclass(frozen=True)
class Case:
    """A run of `job` into any output: `line(output)`; its `result(output)` is the same however it was disturbed."""

    name: str
    job: str
    line: Callable[[Path], list[str]]
    result: Callable[[Path], object]
    prepare: Callable[[Path], None] = _nothing

    def run(self, output: Path) -> None:
        """In this process."""
        import_module(f"ray_jobs.{self.job}").main(self.line(output))


def all_cases(folder: Path) -> dict[str, Case]:
    """The runs of all jobs by name, on photos, an index and checkpoints that are made in `folder` first."""
    city = folder / "city"
    draw_city(city)
    training.draw_training_set(folder / "training")
    draw_index(city, folder / "index")
    line = training.arguments(2, folder / "training", folder / "trained", "train.epochs=3")
    import_module("ray_jobs.train_stage_two").main(line)
    finished.make_run(folder / "finished")
    (folder / "measured").mkdir()
    test_calibrate.write_run(folder / "measured", test_calibrate.queries())
    cases = [
        build_index(city),
        update_index(folder / "index"),
        *(evaluate(city, features) for features in ("recompute", "cache", "store")),
        query(city, folder / "index"),
        plan(),
        *(train(stage, folder / "training") for stage in training.STAGES),
        search_checkpoints(city, folder / "trained"),
        calibrate(folder / "measured"),
        report(folder / "finished"),
        export_weights(folder / "trained"),
    ]
    return {case.name: case for case in cases}


def draw_index(city: Path, root: Path) -> None:
    """`index` of two thirds of the photos, all of which lie in `photos` beside it; `later.txt` lists the rest."""
    shutil.copytree(city / "database", root / "photos")
    later = sorted(path.name for path in (root / "photos").iterdir())[::3]
    (root / "later.txt").write_text("\n".join(later))
    for name in later:
        (root / "photos" / name).rename(root / name)
    build_index(city, root / "photos").run(root / "index")
    for name in later:
        (root / name).rename(root / "photos" / name)


def build_index(city: Path, photos: Path | None = None) -> Case:
    """An approximate index in three shards."""

    def line(output: Path) -> list[str]:
        what = [f"database={photos or city / 'database'}", f"output={output}", "positions=names", "index.num_shards=3"]
        return [*what, *DESCRIBE, "describe.num_actors=2", "index.kind=ivf_rabitq", "index.num_lists=4"]

    return Case("build_index", "build_index", line, index_bytes)


def update_index(root: Path) -> Case:
    """The rest of the photos join a copy of the index of `draw_index`."""

    def line(output: Path) -> list[str]:
        what = [f"index.path={output}", "positions=names", f"add={root}/later.txt"]
        return [*what, "index.num_shards=2", *DESCRIBE]

    return Case("update_index", "update_index", line, index_bytes, lambda output: _copy(root / "index", output))


def evaluate(city: Path, features: str) -> Case:
    """Two actors re-rank one query at a time; `features` is `rerank.dense_features`."""

    def line(output: Path) -> list[str]:
        more = [f"rerank.dense_features={features}", "rerank.num_actors=2", "rerank.queries_per_unit=1"]
        return arguments(city, output, *more, "index.num_shards=3")

    return Case(f"evaluate, {features}", "evaluate", line, _bytes_of("predictions.parquet"))


def query(city: Path, root: Path) -> Case:
    """The city's queries ask the index of `draw_index`."""

    def line(output: Path) -> list[str]:
        what = [f"index.path={root}/index", f"queries={city}/queries", f"output={output}", *DESCRIBE]
        more = ["rerank.num_candidates=10", "rerank.num_threads_per_actor=1", "index.num_threads_per_actor=1"]
        return [*what, *more, "rerank.num_actors=2", "rerank.queries_per_unit=1"]

    return Case("query", "query", line, _bytes_of("predictions.parquet"))


def plan() -> Case:
    """The speed is measured anew each time; all that does not follow from it is the same."""

    def line(output: Path) -> list[str]:
        what = [f"output={output}/plan.json", "plan.num_images=1000000", "plan.calibration_photos=256"]
        return [*what, "describe.num_actors=2", *DESCRIBE]

    def sizes(output: Path) -> object:
        content = json.loads((output / "plan.json").read_text())
        return {key: value for key, value in content.items() if key not in MEASURED_BY_PLAN}

    return Case("plan", "plan", line, sizes, lambda output: output.mkdir(exist_ok=True))


def train(stage: int, photos: Path) -> Case:
    """Two workers, a checkpoint after each step; the result is the losses, and every weight."""

    def line(output: Path) -> list[str]:
        return training.arguments(stage, photos, output, "train.num_workers=2", "train.checkpoint_every_steps=1")

    def trained(output: Path) -> object:
        found = checkpoint.load(checkpoint.last_url(str(output)), stage, "output")
        digests = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in found.model.items()}
        return training.losses(read_metrics(str(output))), found.position, digests

    return Case(training.JOBS[stage], training.JOBS[stage], line, trained)


def search_checkpoints(city: Path, trained: Path) -> Case:
    """All checkpoints of a training of stage two."""
    not_its = ("model.weights", "index.num_retrieved", "index.num_threads_per_actor")

    def line(output: Path) -> list[str]:
        words = [word for word in arguments(city, output) if word.split("=")[0] not in not_its]
        return [*words, "rerank.num_actors=2", "rerank.queries_per_unit=1", f"checkpoints={trained}/checkpoints"]

    return Case("search_checkpoints", "search_checkpoints", line, _bytes_of("checkpoints.csv"))


def calibrate(run: Path) -> Case:
    """Without Ray."""
    return _into_a_file("calibrate", "calibration.json", f"predictions={run}")


def report(run: Path) -> Case:
    """Without Ray."""
    return _into_a_file("report", "report.html", f"run={run}")


def export_weights(trained: Path) -> Case:
    """Without Ray."""
    return _into_a_file("export_weights", "exported.safetensors", f"checkpoint={trained}/checkpoints/last.pt")


def _into_a_file(job: str, name: str, source: str) -> Case:
    return Case(
        job,
        job,
        lambda output: [source, f"output={output}/{name}"],
        _bytes_of(name),
        lambda output: output.mkdir(exist_ok=True),
    )


def _bytes_of(name: str) -> Callable[[Path], object]:
    return lambda output: (output / name).read_bytes()


def index_bytes(index: Path) -> object:
    """Every file that the newest generation names, and which."""
    files = [path for path in sorted(index.rglob("*")) if path.suffix in (".npy", ".faiss", ".parquet")]
    return [(str(path.relative_to(index)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]


def _copy(source: Path, target: Path) -> None:
    if not target.exists():
        shutil.copytree(source, target)
