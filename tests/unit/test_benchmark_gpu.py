"""`benchmarks.gpu` runs whole on a CPU, with torch and numpy alone importable."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
BLOCKED = ("ray", "faiss", "hydra", "omegaconf", "pyarrow", "PIL", "pytorch_metric_learning", "tensorboard", "fsspec")
RUN_WITHOUT = f"""
import runpy, sys
for name in {BLOCKED!r}:
    sys.modules[name] = None
sys.argv = ["benchmarks.gpu", *sys.argv[1:]]
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""


@pytest.mark.slow
def test_every_section_runs_with_torch_alone(tmp_path: Path) -> None:
    line = [sys.executable, "-c", RUN_WITHOUT, "--out", str(tmp_path), "--device", "cpu", "--small"]
    ended = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    sections = ["ceilings", "correctness", "attention", "scoring", "description", "compiled", "published", "training"]
    assert list(rows) == sections
    assert all(its and not any("failed" in row for row in its) for its in rows.values()), rows
    fp32 = next(row for row in rows["correctness"] if row["precision"] == "fp32")
    assert fp32["scores_off_by"] < 1e-4
    assert fp32["same_twice"]
    assert rows["compiled"][0]["off_by"] < 1e-4
    stages = {row["stage"]: row for row in rows["training"]}
    assert "ms" in stages["one"]
    assert "pytorch-metric-learning" in stages["two"]["left_out"]
    assert "not yet run" in (tmp_path / "gpu.md").read_text()
