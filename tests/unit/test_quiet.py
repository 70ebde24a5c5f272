"""Filters of warnings belong to the process: threads that use the package leave those of others alone."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path

import pytest
from PIL import Image

import pairvpr
from pairvpr.data.exif import GpsError, gps_position


def test_a_filter_that_another_thread_sets_meanwhile_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    really_init = Image.init

    def meanwhile() -> bool:  # called while a photo is being opened
        warnings.filterwarnings("error", "set by another thread")
        return really_init()

    monkeypatch.setattr(Image, "init", meanwhile)
    with pytest.raises(GpsError):
        gps_position(b"no photo")
    with pytest.raises(UserWarning):
        warnings.warn("set by another thread", stacklevel=1)


@pytest.mark.slow
def test_filters_are_set_in_one_place_and_none_when_the_package_is_imported() -> None:
    root = Path(pairvpr.__file__).parent
    files = [*root.rglob("*.py"), *(root.parent / "ray_jobs").glob("*.py")]
    calls = {
        f"{path.relative_to(root.parent)}: {node.attr}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("catch_warnings", "filterwarnings", "simplefilter")
    }
    assert calls == {"pairvpr/quiet.py: filterwarnings"}
    at_import = [
        f"{path.relative_to(root.parent)}:{line.lineno}"
        for path in files
        for line in ast.parse(path.read_text()).body
        if isinstance(line, ast.Expr) and "ignore_warnings" in ast.unparse(line)
    ]
    assert at_import == []
