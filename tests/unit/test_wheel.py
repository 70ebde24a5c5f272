"""The wheel, installed into an environment of its own away from the checkout: its command, its files, its types."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
FIVE_LINES = """
from pairvpr import Localizer
localizer = Localizer.open("INDEX", weights="pairvpr-vitB.pth", device="cuda")
for match in localizer.locate("photo.jpg", k=5, near=(37.78, -122.41), radius_m=200):
    print(match.path, match.latitude, match.longitude, match.confidence)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty environment with the wheel alone; what it depends on is taken from the one that runs the tests."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    command = ["uv", "pip", "install", "--offline", "--no-deps", "--python", str(folder / "bin" / "python"), str(wheel)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PATH": path}, timeout=120)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def run(environment: Path, *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = str(environment / "bin" / command[0])
    return subprocess.run([program, *command[1:]], cwd=cwd, env=clean, capture_output=True, text=True, timeout=300)


def test_what_is_in_it(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"pairvpr/configs/{path.relative_to(ROOT / 'configs')}" for path in (ROOT / "configs").rglob("*.*")}
    pages = {str(path.relative_to(ROOT)) for path in (ROOT / "pairvpr").rglob("page/*.*")}
    assert "pairvpr/report/page/page.html" in pages
    others = {"pairvpr/py.typed", "pairvpr/configs/model/tiny.safetensors", "ray_jobs/evaluate.py"}
    assert others | configs | pages <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


def test_the_package_is_that_of_the_wheel(environment: Path, tmp_path: Path) -> None:
    done = run(environment, "python", "-c", "import pairvpr; print(pairvpr.__file__)", cwd=tmp_path)
    assert Path(done.stdout.strip()).is_relative_to(environment)
    shown = run(environment, "pairvpr", "--help", cwd=tmp_path)
    assert shown.returncode == 0
    assert "build_index" in shown.stdout


def test_five_lines_pass_a_strict_type_check(environment: Path, tmp_path: Path) -> None:
    """Also what they print is known: no type of a match is unknown or Any."""
    (tmp_path / "five.py").write_text(FIVE_LINES + "    reveal_type(match.confidence)\n")
    settings = {"typeCheckingMode": "strict", "include": ["five.py"]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    pyright = Path(sys.executable).parent / "pyright"
    command = [str(pyright), "--outputjson", "--pythonpath", str(environment / "bin" / "python"), "-p", str(tmp_path)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300).stdout)
    messages = [about["message"] for about in found["generalDiagnostics"]]
    assert messages == ['Type of "match.confidence" is "float | None"']


@pytest.mark.cluster
def test_it_evaluates_the_toy_city(environment: Path, tmp_path: Path) -> None:
    """With nothing but its own files: configurations, the demo's weights, the drawn photos."""
    small = ("benchmark.num_places=4", "rerank.num_candidates=4", "cluster.num_cpus=2")
    done = run(environment, "pairvpr", "evaluate", "benchmark=toy_city", "output=OUT", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "recall@N" in done.stdout
    content = json.loads((tmp_path / "OUT" / "metrics.json").read_text())
    assert content["model"]["untrained"] is False
