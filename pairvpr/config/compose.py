"""Turns the command line and `configs/` into the dataclasses of `schema.py`, using Hydra.

No other module imports hydra. User mistakes raise a `UserError` that names the valid choices.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from functools import cache
from types import NoneType
from typing import Any, TypeVar, cast, get_args, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from hydra.version import VersionBase
from omegaconf import BooleanNode, DictConfig, FloatNode, IntegerNode, Node, OmegaConf, StringNode
from omegaconf.errors import OmegaConfBaseException

from pairvpr.config import benchmark_schema, schema, serve_schema, train_schema
from pairvpr.config.networks import config_directory
from pairvpr.errors import UserError

T = TypeVar("T")

JOBS: dict[type, str] = {
    schema.EvaluateConfig: "evaluate",
    schema.BuildIndexConfig: "build_index",
    schema.QueryConfig: "query",
    schema.UpdateIndexConfig: "update_index",
    train_schema.TrainStageOneConfig: "train_stage_one",
    train_schema.TrainStageTwoConfig: "train_stage_two",
    train_schema.SearchCheckpointsConfig: "search_checkpoints",
    train_schema.ExportWeightsConfig: "export_weights",
    schema.CheckBenchmarkConfig: "check_benchmark",
    schema.CalibrateConfig: "calibrate",
    schema.PlanConfig: "plan",
    schema.ReportConfig: "report",
    serve_schema.ServeConfig: "serve",
}
DIRECTORIES: dict[type, dict[str, str]] = {
    schema.EvaluateConfig: {"experiment": "experiment"},
    train_schema.TrainStageOneConfig: {"train": "train/stage_one", "train.validation": "benchmark"},
    train_schema.TrainStageTwoConfig: {"train": "train/stage_two", "train.validation": "benchmark"},
}
"""Config groups whose directory is not named like their section."""
LAYOUTS: dict[str, type[benchmark_schema.BenchmarkConfig]] = {
    "folders": benchmark_schema.FoldersConfig,
    "msls": benchmark_schema.MslsConfig,
    "nordland": benchmark_schema.NordlandConfig,
    "pittsburgh": benchmark_schema.PittsburghConfig,
    "toy_city": benchmark_schema.ToyCityConfig,
}
"""Benchmark schemas. Each file in `configs/benchmark/` names its own: `<layout>_schema`."""

FLAGS = ("true", "yes", "y", "on", "1", "false", "no", "n", "off", "0")
"""Accepted spellings of booleans, in upper or lower case."""


def load(job: type[T], arguments: Sequence[str]) -> T:
    """The configuration of `job` (a class of `JOBS`) from command-line arguments `key=value`.

    Raises `UserError` for unknown keys and choices, missing keys and values of the wrong type or range.
    """
    with _hydra():
        overrides = _parse(arguments)
        _check_choices(job, overrides)
        try:
            config = compose(JOBS[job], _lines(job, overrides))
            _check_missing(config)
            _strip_slashes(config)
            return cast(T, OmegaConf.to_object(config))
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(_one_line(error)) from error


def load_evaluations(arguments: Sequence[str]) -> list[schema.EvaluateConfig]:
    """One configuration for each benchmark of `benchmarks=[a,b]`, or the one of `benchmark=a`.

    If the command line names none, the experiment's `benchmarks` apply. With several benchmarks, `benchmark.key=value`
    applies to those that have this key.
    """
    with _hydra():
        overrides = _parse(arguments)
        names = _several_benchmarks(overrides)
    if names is None:
        return [load(schema.EvaluateConfig, [*arguments, "benchmarks=[]"])]  # also where an experiment has some
    for name in names:
        _check_choice("benchmark", name, sorted(_benchmarks()))
    configs = []
    for name in names:
        kept = [
            override.input_line or ""
            for override in overrides
            if not _belongs_to_another(override.key_or_group, name, names)
        ]
        configs.append(load(schema.EvaluateConfig, [f"benchmark={name}", *kept]))
    labels = [config.benchmark.name for config in configs]
    if len(set(labels)) < len(labels):
        raise UserError(f"benchmarks={names}: two have the same name; expected different names")
    return configs


def _several_benchmarks(overrides: Sequence[Override]) -> list[str] | None:
    """The names in `benchmarks=` or else the experiment's; None for a single benchmark."""
    given = {override.key_or_group: override.value() for override in overrides}
    if "benchmarks" in given:
        if "benchmark" in given:
            raise UserError("benchmark=... and benchmarks=[...] are both given: expected one of them")
        names = given["benchmarks"]
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise UserError(f"benchmarks={names}: expected a list of names such as [toy_city,folders]")
        return cast(list[str], names)
    if "benchmark" in given or "experiment" not in given:
        return None
    _check_choice("experiment", given["experiment"], _choices("experiment"))
    return list(compose(JOBS[schema.EvaluateConfig], [f"experiment={given['experiment']}"]).benchmarks) or None


def _belongs_to_another(key: str, benchmark: str, benchmarks: Sequence[str]) -> bool:
    """Whether `benchmark.key` exists in another of these benchmarks but not in this one."""
    if not key.startswith("benchmark."):
        return False
    name = key.removeprefix("benchmark.").split(".")[0]
    holders = [other for other in benchmarks if name in {field.name for field in fields(_benchmarks()[other])}]
    return bool(holders) and benchmark not in holders


def documented_keys(job: type) -> dict[str, str]:
    """The doc line of each key of a job, including its groups and the keys of every benchmark."""
    found = {key: doc for key, _, doc in _documented_keys(job, "")}
    with _hydra():
        for group, directory in _groups(job).items():
            found[group] = f"One of {', '.join(_choices(directory))}."
    return found


def choices_by_key(job: type) -> dict[str, list[str]]:
    """The values that each key of a job takes, where they are a few words, and else nothing."""
    found = {key: _values(hint) for key, hint in _typed_keys(job, "")}
    for section in (group for group, directory in _groups(job).items() if directory == "benchmark"):
        for layout in LAYOUTS.values():
            found |= {key: _values(hint) for key, hint in _typed_keys(layout, f"{section}.")}
    return found | {group: _choices(directory) for group, directory in _groups(job).items()}


def _typed_keys(config: type, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, hint in get_type_hints(config).items():
        if not is_dataclass(hint):
            yield f"{prefix}{name}", hint
        elif hint is not benchmark_schema.BenchmarkConfig:
            yield from _typed_keys(cast(type, hint), f"{prefix}{name}.")


def _values(hint: Any) -> list[str]:
    """What a setting of this type may be, in words."""
    kinds = get_args(hint) or (hint,)
    words = [str(member) for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum) for member in kind]
    if bool in kinds:
        words = ["true", "false"]
    return [*words, "null"] if words and NoneType in kinds else words


def help_text(job: type) -> str:
    """Every group with its choices, and every key with its default and its doc line."""
    lines = [f"usage: pairvpr {JOBS[job]} key=value ...", "", inspect.getdoc(job) or "", ""]
    with _hydra():
        for group, directory in _groups(job).items():
            lines.append(f"  {group}=  one of {', '.join(_choices(directory))}")
    lines.append("")
    for key, default, doc in _documented_keys(job, ""):
        lines += [f"  {key} = {default}", f"      {doc}"]
    sections = [group for group, directory in _groups(job).items() if directory == "benchmark"]
    for section, layout in itertools.product(sections, LAYOUTS.values()):
        names = [name for name, its_layout in _benchmarks().items() if its_layout is layout]
        lines.append(f"\nwith {section}= {', '.join(names)}:")
        for key, default, doc in _documented_keys(layout, f"{section}."):
            lines += [f"  {key} = {default}", f"      {doc}"]
    return "\n".join(lines)


@cache
def _register_schemas() -> None:
    """Hydra keeps them for the whole process."""
    store = ConfigStore.instance()
    for job, name in JOBS.items():
        store.store(name=f"{name}_schema", node=job)
    for name, layout in LAYOUTS.items():
        store.store(group="benchmark", name=f"{name}_schema", node=layout)
    # `${pairvpr.configs:NAME}` is a file next to the YAML files, wherever they are installed.
    OmegaConf.register_new_resolver("pairvpr.configs", lambda name: str(config_directory() / name), replace=True)


_LOCK = threading.RLock()


@contextmanager
def _hydra() -> Iterator[None]:
    """Initialise Hydra with our `configs/`, and restore the state of a process that uses Hydra itself."""
    _register_schemas()
    with _LOCK:
        process, base = GlobalHydra.instance(), VersionBase.instance()
        theirs, their_base = process.hydra, base.version_base
        process.hydra = None
        try:
            with initialize_config_dir(str(config_directory()), version_base="1.3", job_name="pairvpr"):
                yield
        finally:
            GlobalHydra.set_instance(process)
            process.hydra, base.version_base = theirs, their_base


@cache
def _benchmarks() -> dict[str, type[benchmark_schema.BenchmarkConfig]]:
    """The schema of each benchmark, by the benchmark's name."""
    files = sorted((config_directory() / "benchmark").glob("*.yaml"))
    schemas = {path.stem: cast(Any, OmegaConf.load(path)).defaults[0] for path in files}
    return {name: LAYOUTS[its_schema.removesuffix("_schema")] for name, its_schema in schemas.items()}


def _parse(arguments: Sequence[str]) -> list[Override]:
    """The arguments as parsed by Hydra; anything that it can't parse as a single value is a string."""
    parser = OverridesParser.create(config_loader=None)
    parsed = []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        override = None
        with suppress(HydraException):
            override = parser.parse_override(argument)
        if override is None or override.is_sweep_override():
            try:
                override = parser.parse_override(_with_text(key, text) if equals else argument)
            except HydraException as error:
                raise UserError(f"can't read the argument {argument!r}: expected key=value") from error
        override.input_line = argument
        parsed.append(override)
    return parsed


def _with_text(key: str, text: str) -> str:
    """A Hydra override that sets `key` to exactly this string."""
    return f"{key}={QuotedString(text=text, quote=Quote.single).with_quotes()}"


def _line(override: Override, node: Node) -> str:
    """The override in Hydra's syntax, quoted according to the type of its setting.

    Strings are taken literally, even where Hydra would parse them as something else: `2026_11_26`, `1.10`, `yes`, `[a`.
    Two exceptions: enclosing quotation marks are removed, and `null` means None for optional settings.
    """
    line = override.input_line or ""
    key, _, typed = line.partition("=")
    if isinstance(node, StringNode):
        is_quoted = len(typed) > 1 and typed[0] == typed[-1] and typed[0] in "\"'" and override.value() != typed
        if typed.lower() == "null" and node._metadata.optional:
            return line
        text = str(override.value()) if is_quoted else typed
        if "${" in text:
            raise UserError(f"{line}: '${{' (interpolation) is not supported here; expected the value itself")
        return _with_text(key, text)
    if isinstance(node, DictConfig):
        return _texts_by_name(line, override.value())
    value = str(override.value()).lower()
    if isinstance(node, BooleanNode) and value not in FLAGS and "${" not in typed:
        raise UserError(f"{line}: expected true or false")
    if isinstance(node, IntegerNode | FloatNode) and re.match(r"\s*[+-]?0[0-9_]", typed):
        raise UserError(f"{line}: expected a number without a leading 0")
    return _with_text(key, typed) if override.value() == typed else line


def _texts_by_name(line: str, value: object) -> str:
    """The override `key={name: text, ...}` in Hydra's syntax, which adds names that the schema can't know."""
    if not isinstance(value, dict) or "${" in line or not all(isinstance(text, str) for text in value.values()):
        raise UserError(
            f"{line}: expected {{NAME: TEXT, ...}}, with names of letters, digits, - and _; texts like numbers, "
            "flags or null need quotation marks"
        )
    return f"++{line}"


def _groups(job: type) -> dict[str, str]:
    """The groups of a job as users write them, each with the directory of its choices."""
    keys = {field.name for field in fields(job)}
    plain = {path.name for path in config_directory().iterdir() if path.is_dir() and list(path.glob("*.yaml"))}
    return {name: name for name in sorted(plain & keys)} | DIRECTORIES.get(job, {})


def _for_hydra(job: type, override: Override) -> str:
    """The override in Hydra's syntax."""
    line, key = override.input_line or "", override.key_or_group
    directory = _groups(job).get(key, key)
    if directory == key or override.value() is None:
        return line
    package = f"@{key}" if directory == "benchmark" else ""
    return f"{directory}{package}={override.value()}"


def _choices(directory: str) -> list[str]:
    return sorted(path.stem for path in (config_directory() / directory).glob("*.yaml"))


def _check_choice(group: str, choice: object, choices: Sequence[str]) -> None:
    if choice not in choices:
        raise UserError(f"{group}={choice}: unknown; {_suggest(str(choice), choices)}")


def _check_choices(job: type, overrides: Sequence[Override]) -> None:
    groups = _groups(job)
    given = {override.key_or_group for override in overrides}
    for override in overrides:
        key = override.key_or_group
        if override.is_delete() or override.package is not None:
            choices = (
                f"one of {', '.join(_choices(groups[key]))}"
                if key in groups
                else "a key can be set, never moved or removed"
            )
            raise UserError(f"{override.input_line}: expected {key}=... ({choices})")
        if key in groups and not (key == "train.validation" and override.value() is None):
            _check_choice(key, override.value(), _choices(groups[key]))
    may_be_left_out = {field.name for field in fields(job) if field.default is None}
    if "benchmark" in groups and "benchmark" not in given | may_be_left_out:
        raise UserError(f"missing: benchmark=... (one of {', '.join(_choices('benchmark'))})")


def _lines(job: type, overrides: Sequence[Override]) -> list[str]:
    """The overrides in Hydra's syntax. Each `a.b.c` must be a key of the schema selected by the chosen groups."""
    groups = _groups(job)
    chosen = [_for_hydra(job, override) for override in overrides if override.key_or_group in groups]
    config = compose(JOBS[job], chosen)
    return [
        _for_hydra(job, override)
        if override.key_or_group in groups
        else _line(override, _node(config, override.key_or_group))
        for override in overrides
    ]


def _node(config: DictConfig, key: str) -> Node:
    """The setting of this name. Raises `UserError` if it does not exist or is a whole section."""
    node: Any = config
    parts = key.split(".")
    for depth, part in enumerate(parts):
        valid = [str(name) for name in node] if isinstance(node, DictConfig) and node else []
        if part not in valid:
            where = ".".join(parts[:depth])
            prefix = f"{where}." if where else ""
            raise UserError(f"unknown key {key}: {_suggest(part, valid, prefix)}")
        node = node._get_node(part)
    if isinstance(node, DictConfig) and node:
        raise UserError(f"{key} is a section: expected one of its keys, such as {key}.{next(iter(node))}=...")
    return node


def _check_missing(config: DictConfig) -> None:
    """Raise `UserError` naming every key without a value, and `datasets_root` if the benchmark needs it."""
    plain = OmegaConf.to_container(config, resolve=False)
    used = config.get("datasets_root") is None and "${datasets_root}" in str(plain)
    missing = sorted({*_missing_keys(plain), *(["datasets_root"] if used else [])})
    if missing:
        about = "datasets_root: the folder or URL below which the data sets lie; " if used else ""
        keys = ", ".join(f"{key}=..." for key in missing)
        raise UserError(f"missing: {keys} ({about}--help explains each key)")


def _strip_slashes(config: DictConfig) -> None:
    """Strip trailing slashes of paths that others are appended to: on an object store `a//b` is not `a/b`."""
    for name in ("datasets_root", "output"):
        value = config.get(name)
        if value is not None and not value.endswith("://"):
            config[name] = value.rstrip("/") or value


def _missing_keys(node: object, prefix: str = "") -> Iterator[str]:
    """Dotted names of missing values (`???`). OmegaConf's own function fails if a `${...}` refers to one."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _missing_keys(value, f"{prefix}.{key}" if prefix else str(key))
    elif node == "???":
        yield prefix


def _suggest(word: str, valid: Sequence[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(word, valid, n=1)
    hint = f"did you mean {prefix}{close[0]}? " if close else ""
    return f"{hint}valid: {', '.join(prefix + name for name in valid) or 'none here'}"


def _one_line(error: Exception) -> str:
    """A Hydra or OmegaConf error as one line: the key first, without internals."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key = getattr(cause, "full_key", None)
    text = str(cause).strip().splitlines()[0]
    return f"{key}: {text}" if key and key not in text else text


def _documented_keys(config: type, prefix: str) -> Iterator[tuple[str, object, str]]:
    hints = get_type_hints(config)
    docs = _field_docs(config)
    for item in fields(config):
        nested = hints[item.name]
        if is_dataclass(nested):
            if nested is not benchmark_schema.BenchmarkConfig:
                yield from _documented_keys(cast(type, nested), f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", _default_text(item), docs.get(item.name, "")


def _default_text(item: Field[Any]) -> str:
    default = item.default if item.default is not MISSING else cast(Any, item.default_factory)()
    return {"???": "(required)", "None": "null"}.get(str(default), str(default))


def _field_docs(config: type) -> dict[str, str]:
    """The string below each field, read from the source: Python does not keep it."""
    docs: dict[str, str] = {}
    for owner in reversed(config.__mro__[:-1]):
        body = cast(ast.ClassDef, ast.parse(inspect.getsource(owner)).body[0]).body
        for node, following in itertools.pairwise(body):
            if isinstance(node, ast.AnnAssign) and isinstance(following, ast.Expr):
                docs[cast(ast.Name, node.target).id] = cast(str, cast(ast.Constant, following.value).value)
    return docs
