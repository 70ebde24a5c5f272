"""A Python without the packages, as on a fresh cluster, gets one line."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

import ray_jobs
from pairvpr.cli import JOBS

ROOT = Path(__file__).parents[2]


def test_every_job_says_in_one_line_what_is_missing() -> None:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    without_packages = [sys.executable, "-S", "-m"]
    for job in ("evaluate", *list(JOBS)[:2]):
        command = [*without_packages, f"ray_jobs.{job}", "output=OUT"]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 2
        assert ended.stderr.startswith(f"error: {sys.executable} of ")
        assert "hydra-core" in ended.stderr
        assert ended.stderr.count("\n") == 1


def test_the_list_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {Requirement(line).name for line in project["dependencies"]}
    assert {package for module, package in ray_jobs.NEEDED.items() if module != "faiss"} == names
