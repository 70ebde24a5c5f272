"""The report as a person sees it: a real browser opens it from disk with the network off."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pairvpr.config.schema import ReportConfig, ReportSettings
from pairvpr.data.utm import UtmZone, to_degrees
from pairvpr.evaluation.compare import first_answer_is_right, read_run
from pairvpr.report.finished import open_run
from pairvpr.report.make import make_report
from pairvpr.report.outcomes import read_outcomes
from pairvpr.report.side_by_side import write_comparison
from tests.support.browser import Seen, browser, opened, outside, require_browser, until
from tests.support.finished import MadeUpRun, draw_photos, make_run

pytestmark = pytest.mark.slow

HOSTILE = (
    "\"><img src=x onerror='window.hacked=1'>.jpg",
    "</script><script>window.hacked=2</script>.jpg",
    "<!--<script>' ${window.hacked=3} `{{data}}`.jpg",
    "Straße München 東京 \u2028\u2029 \u202e.jpg",
)
HOSTILE_NAME = "</title></script><script>window.hacked=4</script>\"'><img src=x onerror=window.hacked=5>"
DESK, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeUpRun:
    require_browser()
    run = make_run(tmp_path_factory.mktemp("report") / "OUT", name=HOSTILE_NAME, paths=HOSTILE)
    draw_photos(run.benchmark)
    return run


@pytest.fixture(scope="module")
def report(made: MadeUpRun) -> Path:
    return Path(make_report(ReportConfig(run=made.folder)))


@pytest.fixture(scope="module")
def running() -> Iterator[Any]:
    require_browser()
    with browser() as its:
        yield its


def shown(seen: Seen) -> list[int]:
    """Numbers of the queries that are shown, in order."""
    return [
        int(its.get_attribute("id").removeprefix("query-")) for its in seen.page.locator(".card:not([hidden])").all()
    ]


def test_nothing_is_asked_for_and_nothing_of_a_name_runs(running: Any, report: Path) -> None:
    with opened(running, report) as seen:
        seen.page.get_by_role("button", name=re.compile("^All")).click()
        assert seen.page.evaluate("window.hacked") is None
        assert seen.page.locator("h1").text_content() == HOSTILE_NAME
        texts = seen.page.locator(".path").all_text_contents()
        assert set(HOSTILE) <= set(texts)
        assert seen.page.locator("script").count() == 2
        assert seen.errors == []
        assert outside(seen, report) == []


def test_the_policy_of_the_page_refuses_a_script_that_got_in(running: Any, report: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.html"
    changed.write_text(report.read_text().replace("</main>", "<script>window.hacked = 9</script></main>"))
    with opened(running, changed) as seen:
        assert seen.page.evaluate("window.hacked") is None
        assert any("Content Security Policy" in error for error in seen.errors)


def test_every_filter_shows_its_queries(running: Any, report: Path, made: MadeUpRun) -> None:
    outcomes = read_outcomes(open_run(made.folder))
    tags = outcomes.tags()
    assert {"right", "corrected", "broken", "missed", "out_of_reach", "no_match", "refused", "unreadable"} <= set(tags)
    with opened(running, report) as seen:
        for label, expected in tags.values():
            button = seen.page.get_by_role("button", name=re.compile(f"^{re.escape(label)}"))
            button.click()
            assert shown(seen) == np.flatnonzero(expected).tolist()
            assert button.text_content() == f"{label}{expected.sum()}"
            assert button.get_attribute("aria-pressed") == "true"


def test_sorting(running: Any, report: Path, made: MadeUpRun) -> None:
    outcomes = read_outcomes(open_run(made.folder))
    with opened(running, report) as seen:
        seen.page.get_by_label("Sort by").select_option("sure")
        assert shown(seen)[:-1] == np.argsort(-outcomes.confidence[:-1], kind="stable").tolist()
        seen.page.get_by_label("Sort by").select_option("far")
        far = [its for its in shown(seen) if its % 9 == 0]
        assert shown(seen)[: len(far)] == far  # these stand kilometres from all photos


def test_keyboard_and_links(running: Any, report: Path) -> None:
    with opened(running, report, "#q=17") as seen:
        current = "document.activeElement.id"
        assert seen.page.evaluate(current) == "query-17"
        for key, expected in (("j", 18), ("ArrowRight", 19), ("k", 18), ("ArrowLeft", 17)):
            seen.page.keyboard.press(key)
            assert seen.page.evaluate(current) == f"query-{expected}"
            assert seen.page.evaluate("location.hash") == f"#q={expected}"
        seen.page.get_by_role("button", name=re.compile("^Right")).focus()
        seen.page.keyboard.press("Enter")
        first = shown(seen)[0]
        seen.page.keyboard.press("Escape")
        seen.page.evaluate("location.hash = '#q=39'")
        until(seen, f"{current} === 'query-39'")  # unreadable, so all are shown again
        assert 39 in shown(seen)
        assert first in shown(seen)
        seen.page.evaluate("location.hash = '#q=123456'")
        until(seen, "document.getElementById('status').textContent.includes('123456 is not pictured')")


def test_a_click_on_the_map_opens_the_query(running: Any, report: Path, made: MadeUpRun) -> None:
    data = json.loads(re.findall(r'id="data">(.*?)</script>', report.read_text(), re.S)[0])
    utm_m = made.benchmark.queries.utm_m
    corner = np.minimum(made.benchmark.database.utm_m.min(0), utm_m.min(0))
    for query in data["map"]["queries"]:
        assert np.array(query["at"]) / 10 == pytest.approx(utm_m[query["id"]] - corner, abs=0.06)
    with opened(running, report) as seen:
        canvas = seen.page.locator("#canvas")
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        points = np.array([query["at"] for query in data["map"]["queries"]], np.float64)
        known = np.concatenate([points, [point for point in data["map"]["database"] if point]])
        low, high = known.min(0), known.max(0)
        zoom = min((box["width"] - 100) / (high - low)[0], (box["height"] - 100) / (high - low)[1])
        far = int(np.argmax(points.sum(1)))
        place = (points[far] - (low + high) / 2) * zoom * [1, -1] + [box["width"] / 2, box["height"] / 2]
        near = np.hypot(*(points - points[far]).T) * zoom < 3
        canvas.hover(position={"x": place[0], "y": place[1]})
        until(seen, "!document.getElementById('tip').hidden")
        canvas.click(position={"x": place[0], "y": place[1]})
        until(seen, "/^query-/.test(document.activeElement.id)")
        opened_query = int(seen.page.evaluate("document.activeElement.id").removeprefix("query-"))
        assert opened_query in {data["map"]["queries"][row]["id"] for row in np.flatnonzero(near)}
        canvas.focus()
        before = canvas.screenshot()
        for key in ("+", "ArrowLeft", "ArrowUp"):
            seen.page.keyboard.press(key)
        seen.page.wait_for_timeout(100)
        assert canvas.screenshot() != before
        assert seen.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_nothing_overflows_and_axe_finds_nothing_serious(
    running: Any, report: Path, tmp_path: Path, size: dict[str, int], scheme: str
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    with opened(running, report, viewport=size, color_scheme=scheme, bypass_csp=True) as seen:
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        for part in ("summary", "gallery", "map", "protocol"):
            seen.page.evaluate(f"document.getElementById('{part}').scrollIntoView({{behavior: 'instant'}})")
            seen.page.wait_for_timeout(150)
            seen.page.screenshot(path=tmp_path / f"{part}.png")
        found = Axe().run(seen.page).response["violations"]
        serious = [its for its in found if its["impact"] in ("serious", "critical")]
        assert [(its["id"], its["nodes"][0]["html"][:200]) for its in serious] == []
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= size["width"]


def test_rotated_photos_stand_upright_and_missing_ones_say_so(running: Any, tmp_path: Path) -> None:
    made = make_run(tmp_path / "OUT", num_queries=12, num_database=20)
    draw_photos(made.benchmark)
    picture = Image.new("RGB", (80, 40), (0, 0, 255))  # lies on its side: its left half is the top of the scene
    picture.paste((255, 0, 0), (0, 0, 40, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned clockwise by 90 degrees to be seen
    picture.save(made.benchmark.queries.url(2), "JPEG", exif=exif, quality=95)
    Path(made.benchmark.queries.url(3)).unlink()
    Path(made.benchmark.queries.url(4)).write_bytes(b"no photo")
    report = Path(make_report(ReportConfig(run=made.folder)))
    with opened(running, report) as seen:
        seen.page.locator("#query-2 .query img").scroll_into_view_if_needed()
        until(seen, "document.querySelector('#query-2 .query img').complete")
        width, height, top, bottom = seen.page.evaluate(
            """async () => {
            const image = document.querySelector('#query-2 .query img');
            await image.decode();
            const canvas = document.createElement('canvas');
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            const context = canvas.getContext('2d', {willReadFrequently: true});
            context.drawImage(image, 0, 0);
            const at = (y) => [...context.getImageData(canvas.width / 2, y, 1, 1).data];
            return [canvas.width, canvas.height, at(8), at(canvas.height - 8)];
        }"""
        )
        assert (width, height) == (40, 80)
        assert top[0] > 200 > 60 > top[2]
        assert bottom[2] > 200 > 60 > bottom[0]
        assert "No such file" in seen.page.locator("#query-3 .query .gone").text_content()
        assert "UnidentifiedImageError" in seen.page.locator("#query-4 .query .gone").text_content()
        assert seen.errors == []


def test_without_truth_predictions_are_shown(running: Any, tmp_path: Path) -> None:
    made = make_run(tmp_path / "OUT", has_truth=False, has_positions=False)
    draw_photos(made.benchmark)
    report = Path(make_report(ReportConfig(run=made.folder, report=ReportSettings(pictures=10))))
    with opened(running, report) as seen:
        assert "No ground truth" in seen.page.locator(".note").first.text_content()
        assert seen.page.locator("#map").is_hidden()
        assert seen.page.locator(".frame.right, .frame.wrong").count() == 0
        assert len(shown(seen)) == 10
        assert "10 of 40 queries are pictured" in seen.page.locator("#status").text_content()
        assert seen.errors == []


def test_tiles_are_those_of_the_place_and_of_the_named_host_alone(running: Any, tmp_path: Path) -> None:
    """Every tile asked for covers a part of what the map shows, the photos' place is among them, and all are drawn."""
    made = make_run(tmp_path / "OUT")
    draw_photos(made.benchmark)
    settings = ReportSettings(tiles="https://tiles.example/{z}/{x}/{y}.png", utm_epsg=32632)
    report = Path(make_report(ReportConfig(run=made.folder, report=settings)))
    sink = io.BytesIO()
    Image.new("RGB", (256, 256), (12, 200, 34)).save(sink, "PNG")
    with opened(running, report, tile=sink.getvalue()) as seen:
        seen.page.locator("#canvas").scroll_into_view_if_needed()
        seen.page.wait_for_timeout(500)
        asked = [re.fullmatch(r"https://tiles\.example/(\d+)/(\d+)/(\d+)\.png", url) for url in outside(seen, report)]
        assert asked
        zoom, *_ = levels = sorted({int(its[1]) for its in asked if its})
        assert (len(levels), None in asked) == (1, False)
        latitude, longitude = np.radians(to_degrees(made.benchmark.database.utm_m, UtmZone(32, south=False)).mean(0))
        x = int(2**zoom * (longitude / np.pi + 1) / 2)
        y = int(2**zoom * (1 - np.arcsinh(np.tan(latitude)) / np.pi) / 2)
        tiles = {(int(its[2]), int(its[3])) for its in asked if its}
        assert (x, y) in tiles
        assert max(max(abs(east - x), abs(south - y)) for east, south in tiles) <= 8
        drawn = np.array(Image.open(io.BytesIO(seen.page.locator("#canvas").screenshot())).convert("RGB"), np.int64)
        green = (drawn[..., 1] > drawn[..., [0, 2]].max(2) + 40).mean()
        assert green > 0.5
        assert seen.errors == []
    with opened(running, report) as seen:
        seen.page.locator("#canvas").scroll_into_view_if_needed()
        seen.page.wait_for_timeout(300)
        assert all("ERR_INTERNET_DISCONNECTED" in error for error in seen.errors)  # without the host the map is there
        assert seen.page.locator("#tiles-note").is_visible()


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_the_page_of_two_runs(running: Any, tmp_path: Path, size: dict[str, int]) -> None:
    from axe_playwright_python.sync_playwright import Axe

    first, second = (
        make_run(tmp_path / name, name=HOSTILE_NAME, paths=HOSTILE, order_seed=seed)
        for seed, name in enumerate(("one", "two"))
    )
    draw_photos(second.benchmark)
    page = tmp_path / "two.html"
    write_comparison([first.folder, second.folder], str(page))
    before, after = (first_answer_is_right(read_run(run.folder)) for run in (first, second))
    changed = {"Corrected": after & ~before, "Broken": before & ~after}
    with opened(running, page, viewport=size, bypass_csp=True) as seen:
        assert seen.page.evaluate("window.hacked") is None
        assert seen.page.locator("#map").is_hidden()
        for label, mask in changed.items():
            assert mask.any()
            button = seen.page.get_by_role("button", name=re.compile(f"^{label}"))
            button.click()
            assert shown(seen) == np.flatnonzero(mask).tolist()
            assert button.text_content() == f"{label}{mask.sum()}"
        run = seen.page.locator("#comparison tbody th").first
        assert run.bounding_box()["width"] > 80  # long names of runs break, but not letter by letter
        seen.page.get_by_role("button", name=re.compile("^All")).click()
        numbers = shown(seen)
        seen.page.evaluate(f"location.hash = '#q={numbers[0]}'")
        seen.page.wait_for_timeout(50)
        seen.page.keyboard.press("j")
        assert seen.page.evaluate("document.activeElement.id") == f"query-{numbers[1]}"
        seen.page.screenshot(path=tmp_path / "two.png", full_page=True)
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        assert seen.errors == []
        assert outside(seen, page) == []
        found = Axe().run(seen.page).response["violations"]
        assert [its["id"] for its in found if its["impact"] in ("serious", "critical")] == []


def test_print_shows_all_numbers(running: Any, report: Path) -> None:
    with opened(running, report) as seen:
        seen.page.emulate_media(media="print")
        assert seen.page.locator(".nav").is_hidden()
        assert len(seen.page.pdf()) > 10_000
