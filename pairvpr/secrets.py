"""What opens a door to others never becomes text: passwords, tokens and signatures in URLs and in libraries' errors."""

from __future__ import annotations

import re
from typing import TypeVar

T = TypeVar("T")

HIDDEN = "***"
_KEY = r"(?:secret|api|access|account|private|shared)[_-]?key"
_WORD = rf"[\w.-]*(?:passw(?:or)?d|passphrase|secret|token|signature|{_KEY})"
_PLACES = (
    # scheme://user:password@host and scheme://token@host. A secret may hold a slash: then a colon stands before it,
    # which is not that of a port.
    (re.compile(r"(?<=://)(?:[^\s/?#@]*:(?!\d+(?:[/\s]|$))[^\s@]*|[^\s/?#@]+)@"), f"{HIDDEN}@"),
    # scheme://host/path?signature=...#...: stores name their secrets as they like
    (re.compile(r"(://[^\s?'\"<>]*)\?[^\s'\"<>]*[^\s'\"<>:;,.)]"), rf"\1?{HIDDEN}"),
    # token=..., "secret": "...", also where a client's error tells its options
    (re.compile(rf"(?i)(\b{_WORD}['\"]?\s*[=:]\s*)(['\"])(?:(?!\2)[^\n])+\2"), rf"\1\2{HIDDEN}\2"),
    (re.compile(rf"(?i)(\b{_WORD}['\"]?\s*[=:]\s*['\"]?)(?!\s)[^\s'\",;)}}\]]+"), rf"\1{HIDDEN}"),
    (re.compile(r"(?i)\b(authorization\W{1,4}basic|bearer)\s+[\w.~+/=-]{8,}"), rf"\1 {HIDDEN}"),
)


def without_secrets(text: str) -> str:
    """The text with `***` for all that may open a door: what stands in a URL before `@` or after `?`, named tokens."""
    for place, replacement in _PLACES:
        text = place.sub(replacement, text)
    return text


def plain_without_secrets(value: T) -> T:
    """The same for every text in a tree of plain values."""
    if isinstance(value, str):
        return without_secrets(value)  # type: ignore[return-value]
    if isinstance(value, dict):
        return {name: plain_without_secrets(inner) for name, inner in value.items()}  # type: ignore[return-value]
    if isinstance(value, list):
        return [plain_without_secrets(inner) for inner in value]  # type: ignore[return-value]
    return value
