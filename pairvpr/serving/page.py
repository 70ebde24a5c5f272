"""The page at `/`: one HTML text with its style and script inside, and the headers that let nothing else run.

It shares its colours and its map with the report of a run (`pairvpr/report/page`).
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from pairvpr.report.page import shared_script, shared_style


@cache
def page() -> tuple[str, dict[str, str]]:
    """The page, and the HTTP headers to send with it. Every answer is the same: data come by the page's requests."""
    parts = {
        "style": "\n" + shared_style() + _file("page.css"),
        "script": "\n" + shared_script() + _file("page.js"),
    }
    text = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _file("page.html"))
    policy = (
        f"default-src 'none'; script-src {_digest(parts['script'])}; style-src {_digest(parts['style'])}; "
        "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    )
    return text, {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}


def _digest(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _file(name: str) -> str:
    return files("pairvpr.serving").joinpath("page", name).read_text("utf-8")
