"""Without a package, commands that import it end with one line; the others work."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from pairvpr import needed
from pairvpr.cli import JOBS, LOOKS
from pairvpr.needed import WITH_PACKAGES

ROOT = Path(__file__).parents[2]
OURS = ("pairvpr", "ray_jobs")
OF_HYDRA = "omegaconf"
RUN_ALL_THE_SAME = {"python_multipart", "uvicorn"}
"""What FastAPI and Ray Serve need of the extra `serve` without our importing it."""
MODULES = {name: f"ray_jobs.{name}" for name in JOBS} | {name: module for name, (module, _) in LOOKS.items()}


@cache
def imported(module: str) -> frozenset[str]:
    """What a module of this project imports when it is imported itself, by the source."""
    place = ROOT / module.replace(".", "/")
    path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return frozenset(_imports(ast.parse(path.read_text()).body)) if path.is_file() else frozenset()


def _imports(statements: list[ast.stmt]) -> Iterator[str]:
    for statement in statements:
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom) and statement.module:
            yield from (statement.module, *(f"{statement.module}.{alias.name}" for alias in statement.names))
        elif isinstance(statement, ast.If) and ast.unparse(statement.test) != "TYPE_CHECKING":
            yield from _imports(statement.body)


def packages_of(module: str) -> set[str]:
    """The modules of others that a module imports, directly or not."""
    seen, left = set[str](), [module, "pairvpr.boundary"]
    while left:
        name = left.pop()
        if name not in seen:
            seen.add(name)
            parts = name.split(".")
            left += [".".join(parts[:count]) for count in range(1, len(parts))]
            left += imported(name) if parts[0] in OURS else ()
    return {name for name in seen if "." not in name} - set(OURS) - sys.stdlib_module_names


@pytest.mark.parametrize("command", MODULES)
def test_a_command_needs_what_it_imports(command: str) -> None:
    needs = set(needed.NEEDED[command])
    assert needs - packages_of(MODULES[command]) <= (RUN_ALL_THE_SAME if command == "serve" else set())
    assert packages_of(MODULES[command]) - {OF_HYDRA} <= needs


def test_commands_that_read_files_need_neither_ray_nor_faiss() -> None:
    light = {name for name in needed.NEEDED if not {"ray", "faiss"} & set(needed.NEEDED[name])}
    some = {"calibrate", "check_benchmark", "export_weights", "report", "compare", "export", "status", "completion"}
    assert light == some
    assert needed.NEEDED.keys() == JOBS.keys() | LOOKS.keys()


def test_packages_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {Requirement(line).name for line in project["dependencies"]}
    of_extras = {"faiss", *needed.SERVING}
    assert {package for module, package in needed.PACKAGES.items() if module not in of_extras} == names
    assert {module for its in needed.NEEDED.values() for module in its} <= needed.PACKAGES.keys()
    serve = {Requirement(line).name for line in project["optional-dependencies"]["serve"]}
    assert serve - {"ray"} <= {needed.PACKAGES[module] for module in needed.SERVING}


def without(modules: str, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`pairvpr COMMAND` where some modules are not installed."""
    code = (
        f"import sys; sys.modules |= dict.fromkeys({modules.split()}); from pairvpr.cli import main; sys.exit(main())"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *command],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def says(ended: subprocess.CompletedProcess[str], line: str) -> None:
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", f"error: {sys.executable} {line}\n")


def test_one_line_says_what_to_install() -> None:
    says(
        without("faiss torch", "evaluate", "output=OUT"),
        'lacks faiss-cpu (or faiss-gpu), torch; expected pip install "pairvpr[cpu]"',
    )
    says(
        without("fastapi fastapi_offline", "serve", "index.path=INDEX"),
        'lacks fastapi, fastapi-offline; expected pip install "pairvpr[cpu,serve]"',
    )
    says(without("pyarrow", "status", "OUT"), 'lacks pyarrow; expected pip install "pairvpr[cpu]"')
    says(without("hydra", "plan", "--help"), 'lacks hydra-core; expected pip install "pairvpr[cpu]"')
    on_a_cluster = without("ray", "query", "output=OUT", RAY_JOB_CONFIG_JSON_ENV_VAR="{}")
    assert on_a_cluster.stderr.endswith(
        'lacks ray; expected pip install "pairvpr[cpu]" on every node of the cluster, or '
        f"`{WITH_PACKAGES} ray_jobs.JOB ...` (docs/cluster.md)\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        ("calibrate", "predictions=nowhere", "output=nothing.json"),
        ("report", "run=nowhere"),
        ("check_benchmark", "benchmark=msls_val", "datasets_root=nowhere"),
        ("export_weights", "checkpoint=nowhere", "output=w.safetensors"),
        ("compare", "nowhere", "nowhere_else"),
        ("export", "nowhere", "--to", "csv"),
        ("status", "nowhere"),
    ],
)
def test_a_light_command_works_without_ray_and_faiss(line: tuple[str, ...]) -> None:
    """It gets as far as what is wrong with what it is given."""
    ended = without("ray faiss", *line)
    assert ended.returncode in (1, 2)
    assert "nowhere" in ended.stdout + ended.stderr
    assert "lacks" not in ended.stderr


@pytest.mark.parametrize("job", ["evaluate", "calibrate"])
def test_a_job_started_as_a_module_says_the_same(job: str) -> None:
    """Its own imports come first; also on a fresh cluster, whose Python has no package at all."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-S", "-m", f"ray_jobs.{job}", "output=OUT"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    packages = ", ".join(needed.PACKAGES[module] for module in needed.NEEDED[job])
    says(ended, f'lacks {packages}; expected pip install "pairvpr[cpu]"')


def test_no_development_package_slows_down_the_start_of_ray() -> None:
    """jsonschema, which Ray imports, parses one where it is installed: a second in each of a run's many processes."""
    code = "import sys, ray; print('rfc3987_syntax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
