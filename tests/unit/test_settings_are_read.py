"""Every setting of a job is read by code that the job imports, directly or not.

By name: a setting passes that another part of the same code has, too, under the same name.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast, get_type_hints

import pytest

from pairvpr.config.compose import JOBS

ROOT = Path(__file__).parents[2]
REFUSED = {
    "SearchCheckpointsConfig": {
        "store_path",
        "store_whole_database",
        "not_in_map_below",
        "adaptive",
        "report_candidates",
    },
    "ServeConfig": {"store_path", "store_whole_database", "report_candidates"},
}
"""Settings that a job refuses to be set, through another one that they need."""


@cache
def tree(module: str) -> ast.Module | None:
    """The source of a module of this project."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    return ast.parse(path.read_text()) if path.is_file() else None


def imported(module: str) -> Iterator[str]:
    for node in ast.walk(cast(ast.Module, tree(module))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def reached(job: str) -> set[str]:
    """The modules of this project that a job imports, directly or not."""
    seen, left = set[str](), [f"ray_jobs.{job}"]
    while left:
        module = left.pop()
        if module not in seen and tree(module) is not None:
            seen.add(module)
            left += imported(module)
    return seen


def names_read(module: ast.AST) -> Iterator[Any]:
    """Names of attributes that are read, but for what a schema reads of itself to check it."""
    for node in ast.iter_child_nodes(module):
        if isinstance(node, ast.FunctionDef) and node.name == "__post_init__":
            continue
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            yield from (argument.value for argument in node.args[1:2] if isinstance(argument, ast.Constant))
        yield from names_read(node)


def settings_of(schema: type, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Key and default of every setting."""
    hints = get_type_hints(schema)
    for item in fields(cast(Any, schema)):
        if is_dataclass(hints[item.name]):
            yield from settings_of(hints[item.name], f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", item.default if item.default is not MISSING else item.default_factory()  # type: ignore[misc]


@pytest.mark.slow
@pytest.mark.parametrize(("schema", "job"), JOBS.items(), ids=JOBS.values())
def test_every_setting_is_read(schema: type, job: str) -> None:
    read = {name for module in reached(job) for name in names_read(cast(ast.Module, tree(module)))}
    in_files = "".join(path.read_text() for path in (ROOT / "configs").rglob("*.yaml"))
    names = {key.rpartition(".")[2] for key, _ in settings_of(schema)}
    unread = {name for name in names if name not in read and f"${{{name}}}" not in in_files}
    assert unread <= REFUSED.get(schema.__name__, set())


def test_a_setting_that_nothing_reads_is_found() -> None:
    schema = ast.parse("class C:\n def __post_init__(self): self.unread\ndef f(c): return c.read")
    assert set(names_read(schema)) == {"read"}


def test_a_key_has_one_default_in_all_jobs() -> None:
    """Where a job needs a value, or does without, that is no other default; each stage of training has its recipe.

    What a plan asks about a run has the run's default.
    """
    defaults: dict[str, set[str]] = {}
    for schema in JOBS:
        for key, default in settings_of(schema):
            if default not in (None, "???") and not key.startswith("train."):
                defaults.setdefault(key, set()).add(repr(default))
    assert {key: values for key, values in defaults.items() if len(values) > 1} == {}
    shared = {key.removeprefix("plan.") for key in defaults if key.startswith("plan.")}
    for key in defaults:
        name = key.rpartition(".")[2]
        if name in shared:
            assert defaults[key] == defaults[f"plan.{name}"], key
