"""`make soak`: kill -9 at random moments of whole jobs, each with a Ray of its own, until the moments are counted.

The victim is the driver, one of Ray's own processes (raylet, head, the rest), an actor or a task. After each death the
same command runs again, as a restarting cluster would do it. `PAIRVPR_MOMENTS` is how many there are, all jobs together
(1,000 by default).
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.all_jobs import Case, all_cases
from tests.support.runs import descendants, start_job, wait_gone

pytestmark = [pytest.mark.soak, pytest.mark.timeout(0)]

NUM_MOMENTS = int(os.environ.get("PAIRVPR_MOMENTS", "1000"))
MOST_PER_OUTPUT = 4
"""Then the run is left in peace, and must end well."""
LONGEST_RUN_S = 600.0
KINDS = {
    "actor or task": r"^ray::(?!IDLE)",
    "raylet": r"/raylet(\s|$)",
    "head": r"/gcs_server(\s|$)",
    "another process of Ray's": r"dashboard|log_monitor|runtime_env|monitor\.py",
}


def test_moments(tmp_path: Path) -> None:
    """All jobs in turn, so that a run that is cut off has seen each of them."""
    cases, rng = all_cases(tmp_path / "jobs"), random.Random(0)
    names = tuple(cases)
    expected, lengths_s = {}, {}
    for name in names:
        started_s = time.monotonic()
        _run_in_peace(cases[name], tmp_path / "undisturbed" / name)
        lengths_s[name] = time.monotonic() - started_s
        expected[name] = cases[name].result(tmp_path / "undisturbed" / name)
    hits: dict[str, Counter[str]] = {name: Counter() for name in names}
    num_outputs, bystanders = 0, list[psutil.Process]()
    while sum(counter.total() for counter in hits.values()) < NUM_MOMENTS:
        name = names[num_outputs % len(names)]
        output = tmp_path / "disturbed" / f"{num_outputs:04d}"
        _prepare(cases[name], output)
        for _ in range(MOST_PER_OUTPUT):
            is_over, victim = _disturb(cases[name], output, lengths_s[name], rng, bystanders)
            hits[name].update([victim] if victim else [])
            if is_over:
                break
        _run_in_peace(cases[name], output)
        assert cases[name].result(output) == expected[name], f"{name}: other bytes in {output}"
        left = [*output.rglob("*.tmp"), *output.rglob("*.lock")]
        assert not left, f"{name}: left behind: {left}"
        shutil.rmtree(output)
        num_outputs += 1
        print(
            f"{sum(counter.total() for counter in hits.values())} moments, {num_outputs} outputs: {name} the same",
            flush=True,
        )
    wait_gone(bystanders)
    print(_table(hits))


def _prepare(case: Case, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    case.prepare(output)


def _run_in_peace(case: Case, output: Path) -> None:
    _prepare(case, output)
    process = start_job(case.job, case.line(output))
    _, err = process.communicate(timeout=LONGEST_RUN_S)
    assert process.returncode == 0, f"{case.name}: exit code {process.returncode}: {err[-3000:]}"


def _disturb(
    case: Case, output: Path, length_s: float, rng: random.Random, bystanders: list[psutil.Process]
) -> tuple[bool, str | None]:
    """Start the job and kill something at a random moment; whether the job ended well, and the kind of the victim.

    `bystanders` gains the processes that must be gone in the end.
    """
    process = start_job(case.job, case.line(output))
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=rng.uniform(0.0, length_s))
    victim = None
    if process.poll() is None:
        children = descendants(process.pid)
        victim = _kill_one(process.pid, children, rng)
        bystanders += children
    _, err = process.communicate(timeout=LONGEST_RUN_S)
    assert "Traceback" not in err, f"{case.name}, after the death of {victim}: {err[-3000:]}"
    return process.returncode == 0, victim


def _kill_one(driver: int, children: list[psutil.Process], rng: random.Random) -> str | None:
    """Kill -9 a process of a kind chosen at random among those that there are; None if it was gone before."""
    found: dict[str, list[int]] = {"driver": [driver]}
    for child in children:
        with suppress(psutil.NoSuchProcess):
            title = " ".join(child.cmdline())
            for kind, pattern in KINDS.items():
                if re.search(pattern, title):
                    found.setdefault(kind, []).append(child.pid)
                    break
    kind = rng.choice(sorted(found))
    try:
        psutil.Process(rng.choice(found[kind])).kill()
    except psutil.NoSuchProcess:
        return None
    return kind


def _table(hits: dict[str, Counter[str]]) -> str:
    kinds = ["driver", *KINDS]
    lines = [f"| job | {' | '.join(kinds)} | together |", f"| --- |{' ---: |' * (len(kinds) + 1)}"]
    for name, counter in hits.items():
        lines.append(f"| {name} | {' | '.join(str(counter[kind]) for kind in kinds)} | {counter.total()} |")
    together = sum(hits.values(), Counter[str]())
    lines.append(f"| together | {' | '.join(str(together[kind]) for kind in kinds)} | {together.total()} |")
    return "\n".join(lines)
