"""Debian's Chromium, driven by Playwright, without a network. Only tests use either."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
NEEDED = "PAIRVPR_NEEDS_BROWSER"
"""Set where a missing browser is a failure, as in CI."""
FLAGS = ("--no-sandbox", "--disable-background-networking", "--disable-gpu")


@dataclass
class Seen:
    """A page, and what its browser said and asked for: both lists should stay empty."""

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def require_browser() -> None:
    """Skip the test, saying why, where there is no browser; fail where there must be one."""
    try:
        import playwright.sync_api  # noqa: F401

        missing = None if CHROMIUM else "no chromium on this machine (apt-get install chromium)"
    except ImportError:
        missing = "no playwright in this environment"
    if missing and os.environ.get(NEEDED):
        pytest.fail(f"{NEEDED} is set, and there is {missing}")
    if missing:
        pytest.skip(missing)


def until(seen: Seen, expression: str) -> None:
    """Wait until an expression is true in the page. (Playwright's own way is refused by the page's policy.)"""
    for _ in range(100):
        if seen.page.evaluate(expression):
            return
        seen.page.wait_for_timeout(50)
    raise AssertionError(f"never true: {expression}")


@contextmanager
def browser() -> Iterator[Any]:
    """A headless browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield running
        finally:
            running.close()


@contextmanager
def opened(running: Any, file: Path, anchor: str = "", *, tile: bytes | None = None, **options: Any) -> Iterator[Seen]:
    """The page of a file on disk, with the network off; with `tile`, every host answers with this PNG."""
    with visited(running, file.as_uri() + anchor, tile=tile, **{"offline": tile is None} | options) as seen:
        yield seen


@contextmanager
def visited(running: Any, url: str, *, tile: bytes | None = None, **options: Any) -> Iterator[Seen]:
    """The page at an address, in a browser that knows nothing of earlier ones; `tile` as in `opened`."""
    context = running.new_context(**{"viewport": {"width": 1440, "height": 900}} | options)
    try:
        seen = Seen(context.new_page())
        seen.page.set_default_timeout(15_000)
        seen.page.on("console", lambda message: seen.errors.append(message.text))
        seen.page.on("pageerror", lambda error: seen.errors.append(str(error)))
        seen.page.on("request", lambda request: seen.requests.append(request.url))
        if tile is not None:
            seen.page.route(re.compile("^https?://"), lambda route: route.fulfill(body=tile, content_type="image/png"))
        seen.page.goto(url)
        yield seen
    finally:
        context.close()


def outside(seen: Seen, place: Path | str) -> list[str]:
    """Requests for anything but a file, or what is below an address, and what the page carries."""
    own = place.as_uri() if isinstance(place, Path) else place
    return [url for url in seen.requests if not url.startswith(("data:", f"blob:{own}", own))]
