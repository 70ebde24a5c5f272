"""Passes of the network as torch.compile makes them, where model.compile asks for it.

A compiler makes a program for each shape. Callers therefore fill their passes up to a few fixed shapes (`filled`) that
settings and ids decide, so a photo meets the same program wherever it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from pairvpr.config.schema import ModelConfig

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F, config: ModelConfig) -> F:
    """`function`, with model.compile as one graph for each shape; a graph break, or too many shapes, is an error."""
    return cast(F, torch.compile(function, fullgraph=True, dynamic=False)) if config.compile else function


def filled(rows: Tensor, number: int) -> Tensor:
    """(n, ...) -> (number, ...): the first row again behind the others. No fewer rows than there are."""
    return rows if len(rows) >= number else torch.cat([rows, rows[:1].expand(number - len(rows), *rows.shape[1:])])


def power_of_two(number: int) -> int:
    """The smallest that is not below `number`."""
    return 1 << (number - 1).bit_length()
