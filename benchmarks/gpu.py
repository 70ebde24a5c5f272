"""What this network does on one GPU, measured whole: right, how fast, how much of the card, how much memory.

    python -m benchmarks.gpu --out DIR

Run it on an idle GPU, from the root of a clone; torch alone is enough (stage two also needs pytorch-metric-learning).
It takes under 10 minutes, and no section more than its share. Every row is printed and kept in DIR/gpu.json as it
comes; DIR/gpu.md is rewritten after each section, with what was expected on paper beside what was measured. Weights
are random and of full size. `--sections` runs some of them, and `--device cpu --small` tries the script.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_sections import SECTIONS, Bench

SECONDS_IN_ALL = 560.0
SECONDS_OF_A_SECTION = 150.0
NOT_YET_RUN = "not yet run"
EXPECTED: Mapping[str, tuple[str, str]] = {
    "matrix product, bf16, TFLOP/s": ("790", "data sheet: 989"),
    "largest difference of a score from the CPU's, fp32": ("below 1e-3", "above: stop, and compare attention engines"),
    "scoring, vitb, bf16, ms for 100 pairs": ("82", "goal: 40 with compiled passes"),
    "scoring, vitb, bf16, % of the matrix product": ("38", "goal: 60"),
    "compiled scoring, ms for 100 pairs": ("61 with cuDNN's attention", "goal: 40"),
    "host ms to queue a pass": ("3.3", "fewer than 6 pairs in a pass leave the device idle"),
    "description, one photo a pass, ms": ("2", "1.2 of it host work"),
    "description, 64 photos a pass, ms a photo": ("0.3 to 0.4", "goal: 50 % of the matrix product"),
    "description, CUDA graph of one photo, ms": ("-", "should have the bits of one photo a pass"),
    "times the published loop, vitb, 100 candidates": ("-", "goal: at least 15"),
    "times the published loop, vitg, 500 candidates": ("-", "goal: at least 15"),
    "training step, stage one, % of the matrix product": ("-", "goal: at least 40"),
    "training step, stage two, % of the matrix product": ("-", "goal: at least 40"),
}
"""What a first run is compared with, for an H100: from operator counts and the data sheet, none of it measured."""


class OutOfTimeError(Exception):
    """A section's share is spent."""


class Results:
    """Rows by section, kept as they come."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder, self.about = folder, about
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.headlines: dict[str, float] = {}
        self.section, self.ends_s = "", 0.0

    def begin(self, section: str, seconds: float) -> None:
        """The rows that follow are of this section, which may take so long."""
        self.section, self.ends_s = section, time.perf_counter() + seconds
        self.rows[section] = []

    def add(self, **row: Any) -> None:
        """Print and keep a row. Raises `OutOfTimeError` behind the last one that the section has time for."""
        self.rows[self.section].append(row)
        print(self.section, json.dumps(row), flush=True)
        self.write()
        if time.perf_counter() > self.ends_s and self.section:
            raise OutOfTimeError

    def headline(self, name: str, value: float) -> None:
        """A number of `EXPECTED`."""
        assert name in EXPECTED, name
        self.headlines[name] = value

    def write(self) -> None:
        """The whole file of results."""
        content = {"about": self.about, "headlines": self.headlines, "rows": self.rows}
        (self.folder / "gpu.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def report(about: Mapping[str, Any], headlines: Mapping[str, float], rows: Mapping[str, Sequence[Any]]) -> str:
    """Markdown: expected beside measured, then every row."""
    lines = ["# One GPU", "", "; ".join(f"{name}: {value}" for name, value in about.items()), ""]
    lines += ["| | on paper, for an H100 | measured | |", "| --- | ---: | ---: | --- |"]
    for name, (expected, remark) in EXPECTED.items():
        measured = f"{headlines[name]:.4g}" if name in headlines else NOT_YET_RUN
        lines.append(f"| {name} | {expected} | {measured} | {remark} |")
    for section, its in rows.items():
        lines += ["", f"## {section}", "", "```", *(json.dumps(row) for row in its), "```"]
    return "\n".join(lines) + "\n"


def facts(device: torch.device) -> dict[str, Any]:
    """What the numbers belong to."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    return {
        "device": name,
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
        "Python": platform.python_version(),
    }


def run(sections: Sequence[Callable[[Bench, Results], None]], bench: Bench, results: Results) -> None:
    """All sections; one that fails or runs out of time does not keep the next from running."""
    started_s = time.perf_counter()
    for section in sections:
        left_s = SECONDS_IN_ALL - (time.perf_counter() - started_s)
        results.begin(section.__name__, min(SECONDS_OF_A_SECTION, left_s))
        began_s = time.perf_counter()
        try:
            if left_s <= 0:
                raise OutOfTimeError
            section(bench, results)
        except OutOfTimeError:
            print(f"# {section.__name__}: cut short, its time is spent", flush=True)
        except Exception as error:
            results.rows[section.__name__].append({"failed": f"{type(error).__name__}: {error}"[:300]})
            print(f"# {section.__name__} failed: {type(error).__name__}: {error}", flush=True)
        results.write()
        text = report(results.about, results.headlines, results.rows)
        (results.folder / "gpu.md").write_text(text, encoding="utf-8")
        if bench.is_gpu:
            torch.cuda.empty_cache()
        print(f"# {section.__name__}: {time.perf_counter() - began_s:.1f} s", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script (cuda)")
    parser.add_argument("--small", action="store_true", help="small networks and few rounds, to try the script")
    names = [section.__name__ for section in SECTIONS]
    parser.add_argument("--sections", nargs="+", choices=names, default=names, help="which ones (all)")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU on this machine; expected one, or --device cpu --small to try the script")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    results = Results(options.out, facts(device))
    with contextlib.suppress(KeyboardInterrupt):
        run([its for its in SECTIONS if its.__name__ in options.sections], Bench(device, options.small), results)
    print(f"results: {options.out / 'gpu.json'}, {options.out / 'gpu.md'}")


if __name__ == "__main__":
    main()
