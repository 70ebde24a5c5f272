"""Metrics: what the code declares, the docs list and the dashboard asks for are the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
from ray.util.metrics import Counter

from pairvpr.data import storage
from pairvpr.distributed import index, metrics

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy" / "kubernetes" / "monitoring" / "dashboard.json"
LABELS = {metric.exported: {*metric.labels, metrics.JOB} for metric in metrics.ALL}


def docs_row(metric: metrics.Declared) -> str:
    """A metric's line in the docs."""
    kind = "counter" if metric.kind is Counter else "gauge"
    return f"| `{metric.exported}` | {kind} | {metric.unit} | {', '.join(metric.labels)} | {metric.about} |"


def selectors(node: Any) -> list[Any]:
    """All selectors of metrics in a parsed expression."""
    if isinstance(node, promql.VectorSelector):
        return [node]
    inner = [getattr(node, name, None) for name in ("expr", "lhs", "rhs", "vector_selector")]
    found = [selector for part in inner if part is not None for selector in selectors(part)]
    return found + [selector for part in getattr(node, "args", None) or [] for selector in selectors(part)]


def grouping(node: Any) -> set[str]:
    """All labels that aggregations of a parsed expression keep."""
    modifier = getattr(node, "modifier", None)
    labels = set(getattr(modifier, "labels", None) or [])
    inner = [getattr(node, name, None) for name in ("expr", "lhs", "rhs")]
    return labels.union(*(grouping(part) for part in inner if part is not None))


def expressions() -> list[str]:
    """What the dashboard asks, with Grafana's variables replaced."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    texts = [target["expr"] for panel in panels for target in panel["targets"]]
    return [text.replace("$__rate_interval", "1m").replace("$job_id", ".*") for text in texts]


def test_docs_list_every_metric() -> None:
    lines = (ROOT / "docs" / "metrics.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("| `ray_pairvpr")] == [docs_row(metric) for metric in metrics.ALL]


def test_the_step_of_small_work_is_one_name_in_code_and_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = list[str]()
    monkeypatch.setattr(index, "counted", lambda work, step: steps.append(step) or work)
    monkeypatch.setattr(index.ray, "remote", lambda **_: lambda _work: None)
    monkeypatch.setattr(index, "cpus_of_a_shard", lambda: 1.0)
    monkeypatch.setattr(index, "_in_order", lambda _task, _arguments: iter(()))
    assert index.RayRunner().run("", len, []) == []
    assert steps == [metrics.SMALL_WORK]
    assert f"Bytes also have the step `{steps[0]}`" in (ROOT / "docs" / "metrics.md").read_text()


def test_places_that_the_module_names_are_there() -> None:
    named = re.findall(r"`([\w./]+/[\w./]*)`", metrics.__doc__ or "")
    assert len(named) == 2
    assert all((ROOT / name).exists() for name in named)


def test_dashboard_asks_for_declared_names_and_labels_only() -> None:
    asked: set[str] = set()
    for text in expressions():
        parsed = promql.parse(text)
        found = selectors(parsed)
        assert found, text
        for selector in found:
            asked.add(selector.name)
            assert {matcher.name for matcher in selector.matchers.matchers} <= LABELS[selector.name]
            assert grouping(parsed) <= LABELS[selector.name]
    assert asked == set(LABELS), "a metric that no panel shows"


def test_legends_name_labels_that_are_kept() -> None:
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel["targets"]:
            kept = grouping(promql.parse(target["expr"].replace("$__rate_interval", "1m")))
            assert all("{{" + name + "}}" in target["legendFormat"] for name in kept - {"unit"})


def test_bytes_of_a_process_count_for_the_step_that_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: dict[str, float] = {}

    def inc(counter: Counter, value: float, tags: object) -> None:
        recorded[counter.info["name"]] = value

    monkeypatch.setattr(Counter, "inc", inc)
    metrics.count_bytes("before")
    recorded.clear()
    storage.write_bytes(str(tmp_path / "a"), b"12345")
    with storage.written_locally(str(tmp_path / "b")) as path:
        path.write_bytes(b"12")
    storage.read_bytes(str(tmp_path / "a"))
    storage.read_ranges(str(tmp_path / "a"), [(0, 2), (4, 5)])
    metrics.count_bytes("now")
    assert recorded == {"pairvpr_read_bytes": 8.0, "pairvpr_written_bytes": 7.0}
