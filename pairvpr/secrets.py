"""Removes passwords, tokens and signatures from text, as in URLs and errors of libraries."""

from __future__ import annotations

import re
from typing import TypeVar

T = TypeVar("T")

HIDDEN = "***"
_KEY = r"(?:secret|api|access|account|private|shared)[_-]?key"
_WORD = rf"[\w.-]*(?:passw(?:or)?d|passphrase|secret|token|signature|{_KEY})"
_PLACES = (
    # scheme://user:password@host and scheme://token@host. A secret may contain a slash: it then follows a colon
    # that is not a port's.
    (re.compile(r"(?<=://)(?:[^\s/?#@]*:(?!\d+(?:[/\s]|$))[^\s@]*|[^\s/?#@]+)@"), f"{HIDDEN}@"),
    # scheme://host/path?signature=...#...: stores name their secrets in various ways
    (re.compile(r"(://[^\s?'\"<>]*)\?[^\s'\"<>]*[^\s'\"<>:;,.)]"), rf"\1?{HIDDEN}"),
    # token=..., "secret": "...", also in a client's error that prints its options
    (re.compile(rf"(?i)(\b{_WORD}['\"]?\s*[=:]\s*)(['\"])(?:(?!\2)[^\n])+\2"), rf"\1\2{HIDDEN}\2"),
    (re.compile(rf"(?i)(\b{_WORD}['\"]?\s*[=:]\s*['\"]?)(?!\s)[^\s'\",;)}}\]]+"), rf"\1{HIDDEN}"),
    (re.compile(r"(?i)\b(authorization\W{1,4}basic|bearer)\s+[\w.~+/=-]{8,}"), rf"\1 {HIDDEN}"),
)


def without_secrets(text: str) -> str:
    """The text with `***` for possible secrets: parts of URLs before `@` or after `?`, and named tokens."""
    for place, replacement in _PLACES:
        text = place.sub(replacement, text)
    return text


def plain_without_secrets(value: T) -> T:
    """The same for all texts in a tree of plain values."""
    if isinstance(value, str):
        return without_secrets(value)  # type: ignore[return-value]
    if isinstance(value, dict):
        return {name: plain_without_secrets(inner) for name, inner in value.items()}  # type: ignore[return-value]
    if isinstance(value, list):
        return [plain_without_secrets(inner) for inner in value]  # type: ignore[return-value]
    return value
