"""The settings of a directory of answers hold what a table of priors says, not only its name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pairvpr.config.schema import FilterConfig
from pairvpr.data.manifest import Benchmark, Manifest
from ray_jobs.query import _filter_settings, _filters

NAMES = ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("edited", ["b.jpg,500010,4180000", "b.jpg,500000,4180000.5"])
def test_an_edited_table_of_priors_is_another_setting(tmp_path: Path, edited: str) -> None:
    utm_m = np.array([[500_000.0, 4_180_000.0]] * 2)
    benchmark = Benchmark(
        name="mine",
        database=Manifest.of("photos", NAMES, utm_m),
        queries=Manifest.of("queries", NAMES),
        positives=None,
        protocol={},
    )
    table = tmp_path / "priors.csv"
    config = FilterConfig(near_m=50.0, priors=str(table))

    def settings(row: str) -> dict[str, object]:
        table.write_text(f"path,utm_east,utm_north\na.jpg,500000,4180000\n{row}\n")
        return _filter_settings(config, _filters(config, benchmark))

    before = settings("b.jpg,500000,4180000")
    assert settings("b.jpg,500000,4180000") == before
    assert settings(edited) != before
