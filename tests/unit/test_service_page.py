"""The service's page as a person uses it: a real browser, the real service, real answers for a drawn city."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import requests

from pairvpr import DescribeConfig, Localizer, RerankConfig, SearchConfig
from pairvpr.serving.page import page as page_of_the_service
from pairvpr.toy import city as toy_city
from tests.support.browser import Seen, browser, outside, require_browser, until, visited
from tests.support.served import Served, served

pytestmark = pytest.mark.slow

HOSTILE = (
    "\"><img src=x onerror='window.hacked=1'>",
    "<svg onload=window.hacked=2> ${window.hacked=3} `{{script}}` & '; touch hacked; echo '",
)
HOSTILE_INDEX = "<img src=x onerror=window.hacked=4>"
DESK, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}
TOKEN = "s3cret-token"
SEED, NUM_PLACES, K = 5, 10, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`map`, whose names attack the page, their index, and `queries`."""
    root = tmp_path_factory.mktemp("served")
    for part, drawn in (
        ("map", toy_city.database_photos(seed=SEED, num_places=NUM_PLACES, photos_per_place=1)),
        ("queries", toy_city.query_photos(seed=SEED, num_places=NUM_PLACES, photos_per_place=1)),
    ):
        (root / part).mkdir()
        for number, photo in enumerate(drawn):
            name = photo.path.replace("@.jpg", f"{HOSTILE[number % 2]}@.jpg")
            toy_city.draw(photo, width_px=240, height_px=180).save(root / part / name)
    Localizer.build(root / "map", root / "index", model="tiny", positions="names", device="cpu")
    return root


@pytest.fixture(scope="module")
def localizer(folder: Path) -> Localizer:
    one = {"describe": DescribeConfig(num_threads_per_actor=1), "search": SearchConfig(num_threads_per_actor=1)}
    few = RerankConfig(num_candidates=K, num_threads_per_actor=1)
    return Localizer.open(folder / "index", model="tiny", device="cpu", rerank=few, **one)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def at(localizer: Localizer) -> Iterator[Served]:
    with served({"city": localizer}) as service:
        yield service


@pytest.fixture(scope="module")
def query(folder: Path, localizer: Localizer) -> Path:
    """A photo that the network finds: its best match was taken at most 10 m away."""
    for path in sorted((folder / "queries").iterdir()):
        if np.hypot(*(np.array(localizer.locate(path)[0].utm) - position_m(path.name))) < 10:
            return path
    raise AssertionError("the network finds nothing")


@pytest.fixture(scope="module")
def running() -> Iterator[Any]:
    require_browser()
    with browser() as its:
        yield its


def position_m(name: str) -> np.ndarray:
    """East and north in a photo's name."""
    return np.array([float(part) for part in name.split("@")[1:3]])


def hand_over(seen: Seen, event: str, content: bytes, name: str, kind: str = "image/jpeg") -> None:
    """Drop or paste a file, as the browser tells a page of it."""
    seen.page.evaluate(
        """([event, content, name, type]) => {
            const bytes = Uint8Array.from(atob(content), (char) => char.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], name, {type}));
            const made = event === 'drop' ? new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true})
                : new ClipboardEvent('paste', {clipboardData: data, bubbles: true, cancelable: true});
            document.body.dispatchEvent(made);
        }""",
        [event, base64.b64encode(content).decode(), name, kind],
    )


def wait_for_answer(seen: Seen) -> dict[str, Any]:
    """The answer that the page shows, once all its pictures are there."""
    until(seen, "document.getElementById('status').textContent.startsWith('Answered')")
    until(seen, "[...document.querySelectorAll('#answer .frame img')].every((its) => its.naturalWidth)")
    return json.loads(seen.page.locator("#json").text_content())


def ask(seen: Seen, photo: Path) -> dict[str, Any]:
    seen.page.set_input_files("#file", photo)
    return wait_for_answer(seen)


def without_times(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name not in ("request_id", "seconds")}


def test_drop_a_photo_see_the_right_answer_and_the_map(
    running: Any, at: Served, localizer: Localizer, query: Path, tmp_path: Path
) -> None:
    with visited(running, at.url) as seen:
        until(seen, "document.getElementById('facts').textContent !== ''")
        assert seen.page.locator("#facts").text_content() == f"{NUM_PLACES} photos in the map · model tiny"
        hand_over(seen, "drop", query.read_bytes(), query.name)
        answer = wait_for_answer(seen)

        expected = localizer.answer(query.read_bytes(), k=K)
        assert [its["photo_id"] for its in answer["candidates"]] == [match.database_id for match in expected.matches]
        found_m = answer["position"]["utm"]
        assert np.hypot(*(position_m(query.name) - [found_m["east_m"], found_m["north_m"]])) < 10
        degrees = f"{answer['position']['latitude']:.6f}, {answer['position']['longitude']:.6f}"
        assert seen.page.locator("#verdict").text_content() == f"Best match at {degrees}"
        assert seen.page.evaluate("document.activeElement.id") == "answer"
        shown = seen.page.locator("#candidates .path").all_text_contents()
        assert shown == [match.path for match in expected.matches]
        assert seen.page.locator("#pair img").count() == 2

        check_map(seen, answer)
        assert seen.page.evaluate("window.hacked") is None
        assert seen.errors == []
        assert outside(seen, at.url) == []
        line = seen.page.locator("#curl").text_content()

    shutil.copy(query, tmp_path / query.name)
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert without_times(json.loads(done.stdout)) == without_times(answer)
    assert [path.name for path in tmp_path.iterdir()] == [query.name]  # a name with ; runs nothing


def check_map(seen: Seen, answer: dict[str, Any]) -> None:
    """Every candidate's marker is where its UTM metres put it; the best one has the colour of right answers."""
    canvas = seen.page.locator("#canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    utm_m = np.array([[its["utm"]["east_m"], its["utm"]["north_m"]] for its in answer["candidates"]])
    estimate_m = [answer["position"]["utm"][name] for name in ("east_m", "north_m")]
    every_m = np.concatenate([utm_m, [estimate_m]])
    low, high = every_m.min(0), every_m.max(0)
    scale = np.min((np.array([box["width"], box["height"]]) - 100) / np.maximum(high - low, 5))
    places = (utm_m - (low + high) / 2) * scale * [1, -1] + [box["width"] / 2, box["height"] / 2]
    seen.page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    blue = seen.page.evaluate(
        "([x, y]) => [...document.getElementById('canvas').getContext('2d').getImageData(x, y, 1, 1).data]",
        (places[0] + [-7, 0]).tolist(),
    )
    assert blue == [0, 114, 178, 255]
    apart = np.hypot(*(places[:, None] - places[None]).transpose(2, 0, 1)) + 1e9 * np.eye(len(places))
    for number in np.flatnonzero(apart.min(1) > 30)[:2].tolist():
        x, y = places[number]
        canvas.click(position={"x": x, "y": y})
        pressed = seen.page.locator("#candidates button").nth(number).get_attribute("aria-pressed")
        assert pressed == "true"


def test_a_wrong_file_says_so(running: Any, at: Served, query: Path) -> None:
    with visited(running, at.url) as seen:
        problem = seen.page.get_by_role("alert").first
        for event, content, name, says in (
            ("drop", b"a letter", "letter.txt", "not an image"),
            ("paste", query.read_bytes()[:2000], "half.jpg", "the image is broken"),
            ("drop", b"", "empty.jpg", "has no bytes"),
        ):
            hand_over(seen, event, content, name, "")
            until(seen, f"document.getElementById('problem').textContent.startsWith('{name}: ')")
            assert says in problem.text_content()
            assert "(request " in problem.text_content()
            assert seen.page.locator("#answer").is_hidden()
        seen.page.evaluate(
            "document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: new DataTransfer(), bubbles: true}))"
        )
        assert "That was no file" in problem.text_content()
        hand_over(seen, "paste", query.read_bytes(), "image.png", "image/png")  # a good one clears the message
        wait_for_answer(seen)
        assert problem.is_hidden()


def test_why_lays_the_services_overlays_over_both_photos(running: Any, at: Served, query: Path) -> None:
    with visited(running, at.url) as seen:
        answer = ask(seen, query)
        hand_over(seen, "drop", b"a letter", "letter.txt")  # refused: what is shown, and explained, stays the photo
        until(seen, "document.getElementById('problem').textContent !== ''")
        num_errors = len(seen.errors)
        seen.page.get_by_role("button", name="Why this one?").click()
        until(seen, "document.querySelectorAll('#pair .heat').length === 2")
        candidate = answer["candidates"][0]
        found = requests.post(f"{at.url}/v1/why?photo_id={candidate['photo_id']}", data=query.read_bytes()).json()
        sources = seen.page.evaluate("[...document.querySelectorAll('#pair .heat')].map((its) => its.src)")
        assert sources == [found["query"], found["photo"]]
        assert found["pair_score"] == pytest.approx(candidate["pair_score"], abs=1e-4)
        assert seen.page.locator("#pair .heat").first.is_visible()
        seen.page.get_by_role("button", name="Why this one?").click()
        assert not seen.page.locator("#pair .heat").first.is_visible()
        assert len(seen.errors) == num_errors


def test_keyboard_alone(running: Any, at: Served, query: Path) -> None:
    with visited(running, at.url) as seen:
        chosen: list[Any] = []
        seen.page.on("filechooser", lambda chooser: chosen.append(chooser))
        until(seen, "document.getElementById('facts').textContent !== ''")
        seen.page.keyboard.press("Tab")
        until(seen, "document.activeElement.className === 'skip'")
        seen.page.keyboard.press("Tab")
        until(seen, "document.activeElement.id === 'choose'")
        seen.page.keyboard.press("Enter")
        for _ in range(100):
            if chosen:
                break
            seen.page.wait_for_timeout(50)
        chosen[0].set_files(query)
        wait_for_answer(seen)
        pressed = "[...document.querySelectorAll('#candidates button')].findIndex((its) => its.ariaPressed === 'true')"
        for key, place in (("j", 1), ("ArrowRight", 2), ("k", 1), ("ArrowLeft", 0), ("k", 0)):
            seen.page.keyboard.press(key)
            assert seen.page.evaluate(pressed) == place
        before = seen.page.locator("#canvas").screenshot()
        seen.page.locator("#canvas").focus()
        for key in ("+", "ArrowLeft"):
            seen.page.keyboard.press(key)
        seen.page.wait_for_timeout(300)
        assert seen.page.locator("#canvas").screenshot() != before
        assert seen.page.evaluate(pressed) == 0


def test_near_and_radius(running: Any, at: Served, query: Path, localizer: Localizer) -> None:
    best = localizer.locate(query)[0]
    with visited(running, at.url) as seen:
        until(seen, "document.getElementById('facts').textContent !== ''")
        seen.page.get_by_text("Search only near a position").click()
        seen.page.get_by_label("Latitude, longitude").fill("51 north")
        seen.page.get_by_label("Radius, metres").fill("10")
        seen.page.set_input_files("#file", query)
        assert "Expected two numbers" in seen.page.locator("#near-error").text_content()
        assert seen.page.evaluate("document.activeElement.id") == "near"
        assert not any("/v1/locate" in url for url in seen.requests)
        seen.page.get_by_label("Latitude, longitude").fill(f"{best.latitude:.7f}, {best.longitude:.7f}")
        seen.page.keyboard.press("Enter")
        answer = wait_for_answer(seen)
        assert [its["photo_id"] for its in answer["candidates"]] == [best.database_id]
        seen.page.get_by_label("Latitude, longitude").fill("-48.5;8.2")
        seen.page.get_by_role("button", name="Ask again").click()
        until(seen, "document.getElementById('verdict').textContent === 'No photo in the map meets the conditions'")
        assert seen.page.locator("#candidates li").count() == 0
        assert seen.page.locator("#map-box").is_hidden()
        assert seen.errors == []


def test_several_indices_with_hostile_names(running: Any, localizer: Localizer, query: Path) -> None:
    with served({HOSTILE_INDEX: localizer, "city": localizer}) as two, visited(running, two.url) as seen:
        until(seen, "document.getElementById('index').options.length === 3")
        assert seen.page.get_by_role("combobox", name="Search in").is_visible()
        for name, indices in ((HOSTILE_INDEX, {HOSTILE_INDEX}), ("*", {HOSTILE_INDEX, "city"})):
            seen.page.locator("#index").select_option(name)
            answer = ask(seen, query)
            assert {its["index"] for its in answer["candidates"]} == indices
            asked = next(url for url in reversed(seen.requests) if "/v1/locate" in url)
            assert parse_qs(urlsplit(asked).query)["index"] == [name]
            seen.page.evaluate("document.getElementById('status').textContent = ''")
        assert seen.page.evaluate("window.hacked") is None
        assert seen.errors == []


def test_recent_questions_stay_in_this_browser_until_they_are_forgotten(running: Any, at: Served, query: Path) -> None:
    with visited(running, at.url) as seen:
        assert seen.page.locator("#recent").is_hidden()
        answer = ask(seen, query)
        seen.page.reload()
        assert seen.page.locator("#answer").is_hidden()
        seen.page.locator("#recents button").click()
        assert json.loads(seen.page.locator("#json").text_content()) == answer
        assert seen.page.locator("#why").is_disabled()
        until(seen, "[...document.querySelectorAll('.frame img')].every((its) => its.naturalWidth)")
        with visited(running, at.url) as other:
            assert other.page.locator("#recent").is_hidden()
        seen.page.get_by_role("button", name="Forget them").click()
        assert seen.page.locator("#recent").is_hidden()
        assert seen.page.evaluate("localStorage.length") == 0
        assert seen.errors == []


def test_a_token_is_asked_for_once_and_never_shown(running: Any, localizer: Localizer, query: Path) -> None:
    with served({"city": localizer}, token=TOKEN) as service, visited(running, service.url) as seen:
        dialog = seen.page.get_by_role("dialog")
        for token in ("wrong", TOKEN):
            dialog.wait_for(state="visible")
            seen.page.get_by_label("Token", exact=True).fill(token)
            seen.page.keyboard.press("Enter")
            if token == "wrong":
                until(seen, "document.getElementById('token-error').textContent.includes('refused that token')")
        until(seen, "document.getElementById('facts').textContent !== ''")
        assert dialog.is_hidden()
        ask(seen, query)
        assert seen.page.evaluate("Object.values(sessionStorage)") == [TOKEN]
        assert TOKEN not in seen.page.evaluate("JSON.stringify({...localStorage})")
        assert TOKEN not in seen.page.content()
        assert not any(TOKEN in url for url in seen.requests)
        assert "-H 'Authorization: Bearer TOKEN'" in seen.page.locator("#curl").text_content()
        with visited(running, service.url) as other:
            other.page.get_by_role("button", name="Cancel").click()
            until(other, "document.getElementById('problem').textContent.includes('Authorization: Bearer TOKEN')")


def test_a_busy_service_is_asked_again_and_a_dead_one_is_named(running: Any, localizer: Localizer, query: Path) -> None:
    with served({"city": localizer}) as service, visited(running, service.url) as seen:
        refused: list[str] = []

        def refuse_once(route: Any) -> None:
            if refused:
                route.continue_()
                return
            refused.append(route.request.url)
            body = json.dumps({"error": {"code": "busy", "message": "busy", "request_id": "r"}})
            route.fulfill(status=503, body=body, headers={"Retry-After": "1"})

        seen.page.route(re.compile("/v1/locate"), refuse_once)
        ask(seen, query)
        assert len(refused) == 1
        service.server.should_exit = True
        until(seen, "fetch('/healthz').then(() => false, () => true)")
        seen.page.set_input_files("#file", query)
        until(seen, "document.getElementById('problem').textContent.includes('can\\'t be reached')")


def test_the_policy_refuses_what_got_in(running: Any, at: Served) -> None:
    policy = requests.get(at.url).headers["Content-Security-Policy"]
    assert "unsafe" not in policy
    assert {"default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'"} <= set(policy.split("; "))
    text, _ = page_of_the_service()
    assert not re.search(r"https?://(?!www\.w3\.org/)", text)
    with visited(running, at.url) as seen:
        for attack in (
            "document.body.append(Object.assign(document.createElement('script'), {text: 'window.hacked = 1'}))",
            "document.body.innerHTML += '<p>'",
            "document.body.append(Object.assign(document.createElement('img'), {src: 'http://127.0.0.1:9/x'}))",
            "document.body.setAttribute('onclick', 'window.hacked = 1'); document.body.click()",
            "fetch('http://127.0.0.1:9/')",
        ):
            num_errors = len(seen.errors)
            seen.page.evaluate(f"(async () => {{ try {{ {attack}; }} catch {{}} }})()")
            seen.page.wait_for_timeout(100)
            said = " ".join(seen.errors[num_errors:])
            assert "Content Security Policy" in said or "requires 'Trusted" in said, attack
        assert seen.page.evaluate("window.hacked") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_nothing_overflows_and_axe_finds_nothing(
    running: Any, at: Served, query: Path, tmp_path: Path, size: dict[str, int], scheme: str
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    options = {"viewport": size, "color_scheme": scheme, "bypass_csp": True, "has_touch": size is PHONE}
    with visited(running, at.url, **options) as seen:
        assert seen.page.get_by_role("button", name="Take a photo").is_visible() == (size is PHONE)
        seen.page.get_by_text("Search only near a position").click()
        seen.page.screenshot(path=tmp_path / "before.png")
        for moment in ("before", "after"):
            if moment == "after":
                ask(seen, query)
                seen.page.get_by_role("button", name="Why this one?").click()
                until(seen, "document.querySelectorAll('#pair .heat').length === 2")
                for summary in ("Answer as JSON", "The same question with curl"):
                    seen.page.get_by_text(summary).click()
            assert seen.page.evaluate("document.documentElement.scrollWidth") <= size["width"]
            found = Axe().run(seen.page).response["violations"]
            assert [(its["id"], its["nodes"][0]["html"][:200]) for its in found] == []
        seen.page.screenshot(path=tmp_path / "after.png", full_page=True)
        seen.page.evaluate("document.getElementById('token-dialog').showModal()")
        found = Axe().run(seen.page).response["violations"]
        assert [(its["id"], its["nodes"][0]["html"][:200]) for its in found] == []
