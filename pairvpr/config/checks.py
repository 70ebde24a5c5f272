"""What the schemas demand of values: `UserError` in one line that names the key."""

from __future__ import annotations

import math

from pairvpr.errors import UserError


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def require_positive(config: object, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(
            value is None or 0 < value < math.inf, f"{prefix}.{name}={value}: expected a number above 0, and finite"
        )


def require_not_negative(config: object, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(
            value is None or 0 <= value < math.inf, f"{prefix}.{name}={value}: expected 0 or a number above, and finite"
        )


def require_text(config: object, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value is None or value.strip() != "", f"{prefix}{name} is empty: expected a value")
