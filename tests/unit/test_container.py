"""The Dockerfile: hadolint accepts it, what it copies exists, its locks are whole; at length, its install steps run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "container" / "Dockerfile"
CPU_WHEELS = Path("/opt/wheels")
"""Where PyTorch's index for CPUs can't be reached, its wheel may lie here."""
Instruction = tuple[str, str]


def instructions(text: str) -> Iterator[tuple[str, list[Instruction]]]:
    """The stages of a Dockerfile: name and instructions, each with its arguments on one line."""
    joined = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))
    for stage in re.split(r"^(?=FROM )", joined, flags=re.MULTILINE)[1:]:
        lines = [line for line in stage.splitlines() if line.strip()]
        yield lines[0].split(" AS ")[1], [(line.split()[0], line.partition(" ")[2]) for line in lines[1:]]


STAGES = dict(instructions(DOCKERFILE.read_text()))
IMAGES = ("cpu", "gpu")


def hadolint(text: str) -> subprocess.CompletedProcess[str]:
    """Its verdict on a Dockerfile."""
    command = [str(Path(sys.executable).with_name("hadolint")), "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)


def test_hadolint_has_nothing_to_say() -> None:
    found = hadolint(DOCKERFILE.read_text())
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    ("right", "wrong", "rule"),
    [
        ("FROM ${PYTHON_IMAGE} AS tools", "FROM python:latest AS tools", "DL3007"),
        ("USER 1000", "USER root", "DL3002"),
        ("WORKDIR /home/pairvpr", "WORKDIR home/pairvpr", "DL3000"),
    ],
)
def test_hadolint_finds_mistakes(right: str, wrong: str, rule: str) -> None:
    text = DOCKERFILE.read_text()
    assert right in text
    found = hadolint(text.replace(right, wrong))
    assert found.returncode == 1
    assert rule in re.findall(r"^-:\d+ (DL\d{4})\b", found.stdout, re.MULTILINE), found.stdout + found.stderr


@pytest.mark.parametrize("image", IMAGES)
def test_images_end_as_a_user_with_the_command(image: str) -> None:
    assert STAGES[image][-1] == ("USER", "1000")
    assert ("ENTRYPOINT", '["pairvpr"]') in STAGES["base"]
    assert any("useradd --uid 1000" in arguments for name, arguments in STAGES["base"] if name == "RUN")


def test_only_locked_packages_are_installed() -> None:
    installs = [
        command.strip()
        for stage in STAGES.values()
        for name, arguments in stage
        if name == "RUN"
        for command in arguments.split("&&")
        if re.search(r"\bpip (install|sync)\b", command)
    ]
    assert len(installs) == 5
    for command in installs:
        assert "--require-hashes" in command or "--no-deps --no-index" in command, command


def test_what_is_copied_exists_and_reaches_the_build() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [
        source
        for stage in STAGES.values()
        for name, arguments in stage
        if name == "COPY" and "--from" not in arguments
        for source in arguments.split()[:-1]
    ]
    assert len(copied) >= 8
    for source in copied:
        assert (ROOT / source).exists()
        assert any(Path(source).match(pattern) for pattern in kept), source


@pytest.mark.parametrize(("lock", "extras"), [("cpu", ("cpu", "serve")), ("cluster", ("gpu", "serve"))])
def test_locks_meet_the_project(lock: str, extras: tuple[str, ...]) -> None:
    text = (ROOT / f"requirements/{lock}.lock").read_text()
    entries = re.findall(r"^([a-z0-9-]+)==(\S+) \\\n    --hash=sha256:[0-9a-f]{64}", text, re.MULTILINE)
    assert len(entries) == len(re.findall(r"^[a-z]", text, re.MULTILINE)), "an entry without version or hash"
    assert "://" not in text
    locked = {canonicalize_name(name): Version(version) for name, version in entries}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement


@pytest.mark.soak
@pytest.mark.timeout(3000)
def test_the_image_for_cpus_can_be_installed_and_lists_what_it_holds(tmp_path: Path) -> None:
    """Its steps in their order, with /opt, /locks, /src and /dist below a temporary folder; no container is made."""
    text = DOCKERFILE.read_text().replace("/usr/local/bin/python", sys.executable)
    wheels = f"--find-links {CPU_WHEELS}" if CPU_WHEELS.is_dir() else "--torch-backend cpu"
    variables = {"CPU_WHEELS": wheels, "PATH": f"{tmp_path}/opt/tools/bin:{os.environ['PATH']}", "UV_LINK_MODE": "copy"}
    stages = dict(instructions(re.sub(r"(?<![\w.])/(opt/(?!wheels)|locks|src|dist)", rf"{tmp_path}/\1", text)))
    (tmp_path / "opt").mkdir()
    for stage in ("tools", "project", "cpu-packages", "cpu"):
        for name, arguments in stages[stage]:
            if name == "COPY" and "--from" not in arguments:
                *sources, target = arguments.split()
                Path(target).mkdir(parents=True, exist_ok=True)
                for source in sources:
                    path = ROOT / source
                    if path.is_dir():
                        shutil.copytree(path, target, dirs_exist_ok=True)
                    else:
                        shutil.copy(path, target)
            if name == "RUN":
                command = re.sub(r"--mount=\S+ +", "", arguments).replace("python -m venv", f"{sys.executable} -m venv")
                subprocess.run(["sh", "-euc", command], env=os.environ | variables, cwd=tmp_path, check=True)
    bin_ = tmp_path / "opt" / "pairvpr" / "bin"
    help_text = subprocess.run([bin_ / "pairvpr", "--help"], capture_output=True, text=True, check=True).stdout
    assert "build_index" in help_text
    line = ["evaluate", "benchmark=toy_city", "rerank.num_candidates=2", "cluster.num_cpus=2", f"output={tmp_path}/out"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([bin_ / "pairvpr", *line], cwd=tmp_path, env=environment, check=True)
    bill = json.loads((tmp_path / "opt" / "pairvpr" / "sbom.json").read_text())
    locked = set(re.findall(r"^([a-z0-9-]+)==", (ROOT / "requirements/cpu.lock").read_text(), re.MULTILINE))
    assert {canonicalize_name(part["name"]) for part in bill["components"]} == locked | {"pairvpr"}
    without = {part["name"] for part in bill["components"] if not part.get("licenses")}
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    assert without == {name for name in without if re.search(rf"`{name}` \([^)]+\)", page)}, "no licence named"
