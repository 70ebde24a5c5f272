"""The password in a run's URL never reaches what is printed or written of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from pairvpr import cli
from pairvpr.data import sealed, storage
from pairvpr.evaluation.tables import FORMATS
from pairvpr.report import export, side_by_side
from tests.support.finished import make_run

SECRET = "hunter2secret"
URLS = (
    f"memory://u:{SECRET}@box/OUT",
    f"https://u:{SECRET}@box/OUT",
    f"https://{SECRET}@box:8443/OUT",
    f"ftp://u:{SECRET}@box:21/OUT",
    f"webhdfs://u:a/{SECRET}@box/OUT",
)


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every scheme is a store in this process's memory, which takes any password."""
    for scheme in {url.split("://")[0] for url in URLS}:

        class Store(MemoryFileSystem):
            store: ClassVar[dict[str, Any]] = {}  # pyright: ignore[reportIncompatibleVariableOverride]
            pseudo_dirs: ClassVar[list[str]] = [""]
            protocol = scheme

            @classmethod
            def _strip_protocol(cls, path: str) -> str:
                return "/" + path.split("://")[-1].strip("/")

        monkeypatch.setitem(_registry, scheme, Store)


def put_run(folder: Path, url: str, order_seed: int) -> None:
    """A run that everything reads, in `url`."""
    made = make_run(folder, num_queries=240, order_seed=order_seed)
    settings = sealed.read_json(f"{made.folder}/settings.json", "") or {}
    model = {"name": "small", "weights_sha256": "ab" * 32}
    settings |= {"model": model, "rerank": {"batch_size": 3}, "index": {"path": f"{url}/index"}}
    sealed.write_json(f"{made.folder}/settings.json", settings)
    for path in storage.list_files(made.folder):
        storage.write_bytes(f"{url}/{path}", (folder / path).read_bytes())


@pytest.mark.usefixtures("stores")
@pytest.mark.parametrize("url", URLS)
def test_no_text_about_a_run_has_its_password(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [url, f"{url}2"]
    for number, run in enumerate(runs):
        put_run(tmp_path / f"run{number}", run, number)
    texts: dict[str, str] = {}

    def keep(what: str) -> None:
        out, err = capsys.readouterr()
        texts[f"printed by {what}"] = out + err

    for job, words in (
        ("report", (f"run={url}", f"output={tmp_path}/report.html")),
        ("calibrate", (f"predictions={url}", f"output={tmp_path}/calibration.json")),
    ):
        monkeypatch.setattr("sys.argv", [job, *words])
        assert cli.run_job(job) == 0
        keep(job)
    for form in FORMATS:
        assert side_by_side.main([*runs, "--format", form, "--html", f"{tmp_path}/two.html"]) == 0
        keep(f"compare --format {form}")
    for form in ("hloc", "colmap", "kapture", "geojson", "csv"):
        assert export.main([url, "--to", form, "--epsg", "32632"]) == 0
        keep(f"export --to {form}")
        texts[f"export --to {form}"] = storage.read_bytes(f"{url}/{export.FILES[form]}").decode()
    texts |= {file.name: file.read_text() for file in tmp_path.iterdir() if file.is_file()}
    assert {"report.html", "two.html", "calibration.json"} <= texts.keys()
    assert [what for what, text in texts.items() if SECRET in text] == []
    shown = f"***@{url.rpartition('@')[2]}"
    for what in ("report.html", "two.html", "printed by calibrate", "printed by compare --format text"):
        assert shown in texts[what]


@pytest.mark.usefixtures("stores")
@pytest.mark.parametrize("url", URLS)
def test_no_error_about_a_run_has_its_password(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_run(tmp_path / "run", url, 0)
    storage.remove_tree(f"{url}/index")
    assert export.main([url, "--to", "csv"]) == 2
    assert side_by_side.main([url, f"{url}3"]) == 2
    out, err = capsys.readouterr()
    assert "***@box" in err
    assert SECRET not in out + err
