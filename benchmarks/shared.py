"""What the benchmarks share: photos to work on, facts about the machine, the report."""

from __future__ import annotations

import argparse
import datetime
import io
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL
import psutil
import ray
import torch

from pairvpr.config.compose import load
from pairvpr.config.schema import BuildIndexConfig
from pairvpr.data.manifest import Manifest
from pairvpr.toy import city as toy_city

WIDTH_PX, HEIGHT_PX, JPEG_QUALITY = 640, 480, 90
REPORTS = Path(__file__).resolve().parent / "reports"
NAMED_BY_MACHINE = "<machine>"


def draw_photos(folder: Path, num_photos: int, num_distinct: int) -> None:
    """`000000.jpg`, `000001.jpg`, ... of a toy city; past `num_distinct` they are hard links to the first ones."""
    places = -(-num_distinct // len(toy_city.DATABASE_DAYS))
    for i, photo in enumerate(toy_city.database_photos(seed=0, num_places=places)[: min(num_photos, num_distinct)]):
        sink = io.BytesIO()
        toy_city.draw(photo, width_px=WIDTH_PX, height_px=HEIGHT_PX).save(sink, "JPEG", quality=JPEG_QUALITY)
        (folder / photo_name(i)).write_bytes(sink.getvalue())
    for i in range(num_distinct, num_photos):
        original, copy = folder / photo_name(i % num_distinct), folder / photo_name(i)
        try:
            os.link(original, copy)
        except OSError:  # a file system without hard links
            shutil.copyfile(original, copy)


def photo_name(i: int) -> str:
    """Of `draw_photos`."""
    return f"{i:06d}.jpg"


def first_photos(folder: Path, num_photos: int) -> Manifest:
    """The first photos that `draw_photos` put there."""
    return Manifest.of(str(folder), [photo_name(i) for i in range(num_photos)])


def job_config(model: str, batch_size: int, num_threads: int) -> BuildIndexConfig:
    """A model of `configs/model`, and how it is fed; there is no folder of a user."""
    return load(
        BuildIndexConfig,
        [
            "database=unused",
            "output=unused",
            f"model={model}",
            "model.weights=null",
            f"describe.batch_size={batch_size}",
            f"describe.num_threads_per_actor={num_threads}",
        ],
    )


def add_report_option(parser: argparse.ArgumentParser, what: str) -> None:
    """`--report [FILE]`."""
    parser.add_argument(
        "--report",
        metavar="FILE",
        nargs="?",
        const=NAMED_BY_MACHINE,
        help=f"also write the report to FILE; without a name to benchmarks/reports/{what}_<hardware>_<date>.md",
    )


def publish(what: str, text: str, report: str | None) -> None:
    """Print the report, and write it where `--report` says."""
    print(text)
    if report is None:
        return
    default = REPORTS / f"{what}_{_hardware_name()}_{datetime.date.today().isoformat()}.md"
    path = default if report == NAMED_BY_MACHINE else Path(report)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")


def circumstances(module: str, load_at_start: float) -> str:
    """Table of command, date, machine and versions."""
    rows = [
        ("command", f"`{shlex.join(['python', '-m', f'benchmarks.{module}', *sys.argv[1:]])}`"),
        ("date", datetime.date.today().isoformat()),
        ("CPU", f"{_cpu_model()}, {num_cores()} cores"),
        ("memory", f"{psutil.virtual_memory().total / 2**30:.0f} GiB"),
        ("accelerator", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"),
        ("load average at the start", f"{load_at_start:.1f}"),
        ("system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"),
        (
            "versions",
            f"ray {ray.__version__}, torch {torch.__version__}, pillow {PIL.__version__}, numpy {np.__version__}",
        ),
    ]
    return markdown_table(("", "what"), rows)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    ruler = ["---"] + (["---"] if len(header) == 2 else ["---:"] * (len(header) - 1))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ruler, *rows])


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _hardware_name() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_model()
    words = re.sub(r"\((R|TM|C)\)|\bCPU\b|@", " ", device, flags=re.IGNORECASE)
    return f"{re.sub(r'[^a-z0-9.]+', '-', words.lower()).strip('-')}-{num_cores()}-cores"
