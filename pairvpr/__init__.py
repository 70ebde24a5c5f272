"""Pair-VPR at city scale: describe photos, retrieve candidates, re-rank them pair by pair.

    from pairvpr import Localizer

These names are loaded on first use, so that importing the package is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pairvpr.config.schema import DescribeConfig, DescriptorConfig, ModelConfig, RerankConfig, SearchConfig
    from pairvpr.errors import PhotoError, UserError
    from pairvpr.localizer import Localizer
    from pairvpr.located import Located, Match
    from pairvpr.photo import Photo
    from pairvpr.where import Position, Utm

__version__ = "0.1.0"
__all__ = [
    "DescribeConfig",
    "DescriptorConfig",
    "Localizer",
    "Located",
    "Match",
    "ModelConfig",
    "Photo",
    "PhotoError",
    "Position",
    "RerankConfig",
    "SearchConfig",
    "UserError",
    "Utm",
]

_MODULES = {
    **dict.fromkeys(
        ("DescribeConfig", "DescriptorConfig", "ModelConfig", "RerankConfig", "SearchConfig"), "pairvpr.config.schema"
    ),
    **dict.fromkeys(("PhotoError", "UserError"), "pairvpr.errors"),
    "Localizer": "pairvpr.localizer",
    **dict.fromkeys(("Located", "Match"), "pairvpr.located"),
    "Photo": "pairvpr.photo",
    **dict.fromkeys(("Position", "Utm"), "pairvpr.where"),
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'pairvpr' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
