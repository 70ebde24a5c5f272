"""The command `pairvpr`: its table of jobs, help, and mistakes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from pairvpr import cli
from pairvpr.config.compose import JOBS as SCHEMAS
from pairvpr.config.compose import documented_keys, help_text


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["pairvpr", *arguments])
    return cli.main()


def test_every_job_is_in_the_table_and_has_a_module() -> None:
    assert {job.config: name for name, job in cli.JOBS.items()} == SCHEMAS
    assert {job.group for job in cli.JOBS.values()} == set(cli.GROUPS)
    assert all(importlib.util.find_spec(f"ray_jobs.{name}") for name in cli.JOBS)


def test_help_names_each_job_and_loads_nothing_heavy() -> None:
    code = """
import sys; sys.argv = ["pairvpr", "--help"]
from pairvpr.cli import main
assert main() == 0
print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "ray", "hydra", "numpy"}), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.split() == ["[]"]
    lines = [line.split() for line in done.stdout.splitlines()]
    for name in (*cli.JOBS, *cli.LOOKS):
        assert sum(line[:1] == [name] for line in lines) == 1


@pytest.mark.slow
@pytest.mark.parametrize("job", cli.JOBS.values(), ids=list(cli.JOBS))
def test_short_help_shows_real_keys(
    job: cli.Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Every example sets a key that the job has; the first ones are those without a default."""
    assert run(job.name, "--help", monkeypatch=monkeypatch) == 0
    shown = capsys.readouterr().out
    known = documented_keys(job.config)
    assert len(job.examples) <= 16
    assert len({example.partition("=")[0] for example in job.examples}) == len(job.examples)
    for example in job.examples:
        key = example.partition("=")[0]
        assert f"  {example}\n      {known[key]}" in shown
    assert run(job.name, "--help-all", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out == help_text(job.config) + "\n"
    required = [line.split()[0] for line in help_text(job.config).splitlines() if line.endswith("= (required)")]
    for key in required:
        if not key.startswith(("benchmark.", "train.validation.")):
            assert any(example.startswith(f"{key}=") for example in job.examples), key


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("evalute", "evalute: no such job; did you mean evaluate? expected one of build_index, "),
        ("build-index", "did you mean build_index? "),
        ("xyz", "xyz: no such job; expected one of build_index, "),
        ("output=OUT", "no such job; expected one of build_index, "),
    ],
)
def test_an_unknown_job(word: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert run(word, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_compare_and_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert run("compare", "/nowhere", monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert run("--version", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.startswith("pairvpr 0.")
