"""One HTML file of parts: nothing in it asks the network for anything, and no text of a run is ever run.

Text goes into HTML escaped. Data goes into a JSON block that browsers don't execute, without `<`, `>` and `&`, so no
name ends it. A content security policy lets the page's own script run, by its digest, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

_ESCAPED = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}


def page(title: str, parts: Mapping[str, str], data: Mapping[str, Any], tiles: str | None = None) -> str:
    """The whole page. `parts` are HTML: `masthead`, `figures`, `sections`, `about`; `tiles` as in the settings."""
    style, script = shared_style() + _file("page.css"), shared_script() + _file("page.js")
    filled = {
        "title": escape(title),
        "policy": escape(_policy(script, tiles), quote=True),
        "style": style,
        "script": script,
        "data": json_in_html(data),
        **parts,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: filled[found[1]], _file("page.html"))


def shared_style() -> str:
    """CSS of this page and the service's: colours, panels, photos, the map's surroundings."""
    return _file("base.css")


def shared_script() -> str:
    """JavaScript of this page and the service's: `element` and others, `createMap`."""
    return _file("elements.js") + _file("map.js")


def json_in_html(data: Mapping[str, Any]) -> str:
    """JSON that stays inside the block it is put into, whatever its texts are."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_ESCAPED)


def _policy(script: str, tiles: str | None) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    pictures = "data:"
    if tiles is not None:
        address = urlsplit(tiles)
        pictures += f" {address.scheme}://{re.sub(r'{[^}]*}', '*', address.netloc)}"
    return (
        f"default-src 'none'; img-src {pictures}; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _file(name: str) -> str:
    return files("pairvpr.report").joinpath("page", name).read_text("utf-8")
