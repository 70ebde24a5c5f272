"""The commands of README and docs name jobs, settings and choices that exist. Nothing is run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray._private.runtime_env import uv_runtime_env_hook as uv_hook

from pairvpr.cli import JOBS, LOOKS
from pairvpr.config.compose import load, load_evaluations
from pairvpr.config.schema import EvaluateConfig
from pairvpr.errors import UserError
from pairvpr.needed import WITH_PACKAGES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
LEFT_OUT = {
    "evaluate": ["benchmark=folders", "benchmark.database=DIR", "benchmark.queries=DIR", "model=tiny", "output=OUT"],
    "query": ["index.path=INDEX", "queries=DIR", "model=tiny", "output=OUT"],
    "build_index": ["database=DIR", "model=tiny", "output=INDEX"],
}
"""What `...` stands for in a command."""
BEGIN = re.compile(r"(\$ )?(\S*/)?(pairvpr|ray job submit|serve run|sbatch|docker run) ")


def commands(page: str) -> Iterator[list[str]]:
    """The words of each command that may run a job, in the code blocks of a page."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if not language and BEGIN.match(line):
                yield shlex.split(line.removeprefix("$ "), comments=True)


def job_of(words: list[str]) -> tuple[str, list[str]] | None:
    """The job that a command runs, and its words; None if it runs none."""
    is_container = words[:2] == ["docker", "run"] and "--entrypoint" not in words
    for number, word in enumerate(words):
        after = words[number + 1 :]
        if word.startswith("ray_jobs."):
            return word.removeprefix("ray_jobs.").removesuffix(":app"), after
        if Path(word).name in ("pairvpr", "pairvpr.sbatch") and (number == 0 or words[0] == "sbatch"):
            return after[0], after[1:]
        if is_container and word.startswith("pairvpr:"):
            return after[0], after[1:]
    return None


def check(name: str, words: list[str]) -> None:
    """Raise `UserError` unless the job takes these words."""
    job = JOBS[name]
    given = [word if "=" in word else f"{job.subject}={word}" for word in words if word != "..."]
    if "..." in words:
        keys = {word.partition("=")[0] for word in given}
        given += [word for word in LEFT_OUT[name] if not keys & {word.partition("=")[0], word.partition(".")[0]}]
    _ = load_evaluations(given) if job.config is EvaluateConfig else load(job.config, given)


@pytest.mark.parametrize("page", PAGES)
def test_jobs_take_the_settings_of_the_page(page: str) -> None:
    for name, words in filter(None, map(job_of, commands(page))):
        if name not in LOOKS:
            check(name, words)


def test_commands_are_found() -> None:
    found = [name for page in PAGES for name, _ in filter(None, map(job_of, commands(page)))]
    assert set(found) >= {*JOBS, *LOOKS} - {"completion"}
    assert len(found) > 60


@pytest.mark.parametrize(
    "line",
    [
        "pairvpr evaluate ... model.precison=bf16",
        "pairvpr evaluate ... benchmark=toy_town",
        ".venv/bin/pairvpr plan model=vitb",
        "serve run ray_jobs.serve:app index.path=INDEX serve.spilt=true",
        "docker run --rm pairvpr:0.1.0-cpu evaluate ... rerank.num_candidates=many",
    ],
)
def test_mistakes_are_caught(line: str) -> None:
    found = job_of(shlex.split(line))
    assert found is not None
    with pytest.raises(UserError):
        check(*found)


def test_uv_runs_the_pinned_packages_on_a_cluster_of_somebody_else() -> None:
    """Ray gives the options of the driver's `uv run` to its workers: it must know each of them, and find the files."""
    (words,) = [words for words in commands("docs/cluster.md") if "uv" in words]
    uv_run = words[words.index("uv") :]
    options, command = uv_hook._parse_args(uv_hook._create_uv_run_parser(), uv_run[2:])
    assert command[:3] == ["python", "-m", "ray_jobs.evaluate"]
    assert options.no_project
    assert options.with_requirements == ["requirements/cluster.lock"]
    uv_hook._check_working_dir_files(options, {"working_dir": "."})
    assert uv_run[: uv_run.index("ray_jobs.evaluate")] == WITH_PACKAGES.split()
