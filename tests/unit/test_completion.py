"""Completion as the shells themselves do it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import cache

import pytest

from pairvpr import cli, completion
from pairvpr.config.compose import choices_by_key, documented_keys
from pairvpr.config.schema import DecisionRule, IndexKind

pytestmark = pytest.mark.slow

COMPLETE_IN_BASH = """
COMP_LINE="$1" COMP_POINT=${#1}
compopt() { echo nospace >&2; }
_pairvpr
printf '%s\\n' "${COMPREPLY[@]}"
"""


@cache
def script(shell: str) -> str:
    return completion.script(shell)


def offered(line: str) -> list[str]:
    """What bash offers behind a line."""
    done = subprocess.run(
        ["bash", "-c", f"{script('bash')}\n{COMPLETE_IN_BASH}", "bash", line],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("pairvpr ", [*cli.JOBS, *cli.LOOKS]),
        ("pairvpr bui", ["build_index"]),
        ("pairvpr evaluate benchmark=toy", ["toy_city"]),
        ("pairvpr evaluate benchmark=toy_city model=vit", ["vitb", "vitg", "vitl", "vits"]),
        ("pairvpr evaluate index.kind=", [str(kind) for kind in IndexKind]),
        ("/usr/bin/pairvpr query rerank.decision=", [str(rule) for rule in DecisionRule]),
        ("pairvpr query rerank.adap", ["rerank.adaptive="]),
        ("pairvpr query rerank.adaptive=", ["true", "false"]),
        ("pairvpr evaluate benchmark.radius", ["benchmark.radius_m="]),
        ("pairvpr evaluate output=", []),
        ("pairvpr compare OU", []),
        ("pairvpr unheard_of a", []),
        ("pairvpr quer rerank.", []),
    ],
)
def test_bash_offers(line: str, expected: list[str]) -> None:
    assert sorted(offered(line)) == sorted(expected)


@pytest.mark.parametrize("name", cli.JOBS)
def test_every_key_of_every_job_is_offered(name: str) -> None:
    job, found = cli.JOBS[name].config, set(offered(f"pairvpr {name} "))
    assert found == {f"{key}=" for key in choices_by_key(job)}
    assert found >= {f"{key}=" for key in documented_keys(job)}


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_the_shells_read_their_scripts(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n"], input=script(shell), text=True, check=True, capture_output=True)


def test_fish_offers() -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    lines = ("pairvpr bui", "pairvpr query rerank.decision=")
    code = script("fish") + "\n" + "\n".join(f"complete -C '{line}'" for line in lines)
    done = subprocess.run(["fish", "--no-config", "-c", code], capture_output=True, text=True, check=True)
    words = [line.split("\t")[0] for line in done.stdout.splitlines()]
    assert words[0] == "build_index"
    assert set(words[1:]) >= {f"rerank.decision={rule}" for rule in DecisionRule}


def test_it_is_printed_without_torch_and_ray(capsys: pytest.CaptureFixture[str]) -> None:
    code = """
import sys; sys.argv = ["pairvpr", "completion", "bash"]
from pairvpr.cli import main
assert main() == 0
print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "ray", "faiss"}), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.split() == ["[]"]
    assert done.stdout == script("bash") + "\n"
    assert completion.main(["tcsh"]) == 2
    assert capsys.readouterr().err == "error: completion tcsh: expected one of bash, zsh, fish\n"
