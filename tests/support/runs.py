"""A small city on disk, a small network, and ways to run the jobs on them as a user does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch

from pairvpr.config.compose import load_evaluations
from pairvpr.data.benchmarks import load_benchmark
from pairvpr.evaluation.confidence import Judge, read_calibration
from pairvpr.evaluation.predictions import predictions_table, write_predictions
from pairvpr.models.weights import build_model, load_weights
from pairvpr.retrieval import pipeline
from pairvpr.toy import city as toy_city

ROOT = Path(__file__).resolve().parents[2]
BEFORE_SEALS = ROOT / "tests" / "fixtures" / "before_seals"
NUM_PLACES = 12
SMALL_NETWORK = (
    "model=tiny",
    "model.weights=null",
    "model.image_size_px=56",
    "model.encoder.pretrain_image_size_px=56",
    "model.encoder.depth=2",
    "model.encoder.num_trainable_blocks=2",
    "model.decoder.depth=1",
)
ONE_THREAD = tuple(f"{step}.num_threads_per_actor=1" for step in ("describe", "index", "rerank"))
_AGENTS: list[psutil.Process] = []
"""Ray's agents that `wait_gone` left to `wait_for_agents`."""


def draw_city(folder: Path, num_places: int = NUM_PLACES) -> None:
    """`database` and `queries`: drawn photos, copies that tie with them, and one broken photo in each."""
    for part, photos in (
        ("database", toy_city.database_photos(seed=3, num_places=num_places, photos_per_place=3)),
        ("queries", toy_city.query_photos(seed=3, num_places=num_places, photos_per_place=1)),
    ):
        (folder / part).mkdir(parents=True)
        for photo in photos:
            toy_city.draw(photo, width_px=96, height_px=72).save(folder / part / photo.path, quality=85)
        first, last = photos[0].path, photos[-1].path
        (folder / part / last.replace("@.jpg", "@broken.jpg")).write_bytes((folder / part / first).read_bytes()[:400])
    for photo in toy_city.database_photos(seed=3, num_places=num_places, photos_per_place=3)[::4]:
        for copy in ("copy1", "copy2"):
            shutil.copy(
                folder / "database" / photo.path, folder / "database" / photo.path.replace("@.jpg", f"@{copy}.jpg")
            )


def arguments(city: str | Path, output: str | Path, *more: str) -> list[str]:
    """The command line of a small evaluation; later arguments win."""
    return [
        "benchmark=folders",
        f"benchmark.database={city}/database",
        f"benchmark.queries={city}/queries",
        "benchmark.radius_m=25",
        f"output={output}",
        "describe.batch_size=4",
        "rerank.batch_size=4",
        "rerank.queries_per_unit=2",
        "rerank.num_candidates=10",
        "index.num_retrieved=30",
        *SMALL_NETWORK,
        *ONE_THREAD,
        *more,
    ]


def unpack_before_seals(folder: Path) -> None:
    """The files of an earlier version, as if that had written them into `folder`."""
    shutil.copytree(BEFORE_SEALS, folder)
    for file in folder.rglob("*.json"):
        file.write_text(file.read_text().replace("@FIXTURE@", str(folder)))


def single_machine_predictions(line: Sequence[str], file: Path) -> bytes:
    """predictions.parquet as the pipeline without Ray makes it, in a process of its own."""
    code = "import sys; from tests.support.runs import write_single_machine as w; w(sys.argv[1], sys.argv[2:])"
    subprocess.run([sys.executable, "-c", code, str(file), *line], cwd=ROOT, check=True, timeout=300)
    return file.read_bytes()


def write_single_machine(file: str, line: Sequence[str]) -> None:
    """Run the single-machine pipeline on a command line and write its predictions."""
    config = load_evaluations(line)[0]
    benchmark = load_benchmark(config.benchmark, config.output)
    model = build_model(config.model, load_weights(config.model), torch.device("cpu"))
    judge, stop_margin, decision = None, None, None
    if config.rerank.calibration is not None:
        found = read_calibration(config.rerank.calibration)
        decision = found.decision(config.rerank.calibration, config.rerank.decision, config.rerank.num_candidates)
        fitted = decision or found
        judge = Judge(fitted.temperature, fitted.midpoint, config.rerank.not_in_map_below)
        stop_margin = fitted.stop_margin if config.rerank.adaptive else None
    answers = pipeline.run(benchmark, model, config, stop_margin, decision)
    write_predictions(file, predictions_table(benchmark, answers, judge))


def start_job(job: str, line: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    """`python -m ray_jobs.<job> ...` in the background."""
    return subprocess.Popen(
        [sys.executable, "-m", f"ray_jobs.{job}", *line],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_job(job: str, line: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m ray_jobs.<job> ...` to its end."""
    process = start_job(job, line, **environment)
    out, err = process.communicate(timeout=400)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_until(
    happened: Callable[[], bool], what: str, timeout_s: float = 300.0, job: subprocess.Popen[str] | None = None
) -> None:
    """Poll; fails the test, naming `what`, when it does not happen in time, or the `job` ends without it."""
    deadline_s = time.monotonic() + timeout_s
    while not happened():
        if job is not None and job.poll() is not None and not happened():
            raise AssertionError(f"{what} did not happen, and the job ended ({job.returncode}): {job.communicate()[1]}")
        assert time.monotonic() < deadline_s, f"{what} did not happen within {timeout_s:.0f} s"
        time.sleep(0.02)


def kill_when(job: subprocess.Popen[str], happened: Callable[[], bool], what: str) -> list[psutil.Process]:
    """Kill a job's driver as soon as something happened; gives all processes that it had started."""
    wait_until(happened, what, job=job)
    children = descendants(job.pid)
    job.kill()
    job.communicate()
    return children


def descendants(pid: int) -> list[psutil.Process]:
    """All processes below one, Ray's included."""
    return psutil.Process(pid).children(recursive=True)


def actors(pid: int, name: str) -> list[psutil.Process]:
    """Processes below one that are actors of the class `name`; Ray puts that into their titles."""
    found = [(process, _title(process)) for process in descendants(pid)]
    return [process for process, title in found if re.match(rf"ray::{re.escape(name)}\b", title)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def wait_gone(processes: Sequence[psutil.Process]) -> None:
    """All of them end; fails the test if one is left. Ray's agents may take until the end of all tests.

    An agent takes a minute to see that its node is gone: `wait_for_agents` waits for all of them at once.
    """
    agents = [process for process in processes if re.match(r"ray::\w+Agent\b", _title(process))]
    _, alive = psutil.wait_procs([process for process in processes if process not in agents], timeout=150)
    assert not alive, f"processes left behind: {alive}"
    _AGENTS.extend(agents)


def wait_for_agents() -> None:
    """Every agent that `wait_gone` left ends; fails if one does not."""
    _, alive = psutil.wait_procs(_AGENTS, timeout=150)
    assert not alive, f"processes left behind: {alive}"
