"""Pair logits with less work: whatever depends on one image alone is computed once per image, not once per pair.

B pairs, n images, L patches, D decoder width, H heads, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pairvpr.models.compiled import compiled
from pairvpr.models.pair_decoder import DecoderBlock, KeysValues
from pairvpr.models.pair_vpr import PairVPR


@dataclass(frozen=True, kw_only=True)
class Reuse:
    """What is computed once per image. Each option changes scores by rounding only (docs/reranking.md)."""

    memory: bool = True
    """A memory's keys and values in every block; otherwise they are recomputed for every pair."""
    first_attention: bool = True
    """The first block's self-attention, which depends on the first image alone."""
    last_row: bool = True
    """In the last block, compute only the class token's row: the pair classifier reads nothing else."""


ALL_REUSE = Reuse()


@dataclass(frozen=True, eq=False)
class Memory:
    """Second images of pairs: tokens (n, L, D) and, if precomputed, each block's keys and values."""

    tokens: Tensor
    keys_values: Sequence[KeysValues] | None = None


class PairScorer:
    """Scores pairs of images that went through `PairVPR.embed`, reusing per-image work as `Reuse` says.

    An image is either the first of a pair (`as_first`) or its memory (`as_memory`).
    """

    def __init__(self, model: PairVPR, reuse: Reuse = ALL_REUSE) -> None:
        self.model = model
        self.reuse = reuse
        self._blocks: list[DecoderBlock] = list(model.dec_blocks)  # type: ignore[arg-type]
        if model.config.compile:
            self.as_first = compiled(self.as_first, model.config)
            self.as_memory = compiled(self.as_memory, model.config)
            self.logits = compiled(self.logits, model.config)

    def as_first(self, embedded: Tensor) -> Tensor:
        """(n, L, D) -> the sequence (n, 1 + L, D) that the decoder starts from: class token first."""
        with self.model.autocast(embedded.device):
            x = self.model.first_sequence(embedded)
            return self._blocks[0].attend_itself(x) if self._has_first_attention else x

    def as_memory(self, embedded: Tensor, *, keep: bool) -> Memory:
        """(n, L, D) -> memories; with `keep` each holds its keys and values in all blocks, 2 x depth x (L, D)."""
        with self.model.autocast(embedded.device):
            tokens = self.model.second_sequence(embedded)
            if not (keep and self.reuse.memory):
                return Memory(tokens)
            return Memory(tokens, [block.keys_values(tokens) for block in self._blocks])

    def logits(self, first: Tensor, first_of: Tensor | None, memory: Memory, memory_of: Tensor | None) -> Tensor:
        """Logits (B,) float32 of the pairs (first[first_of], memory[memory_of]); both (B,) int64.

        None stands for rows 0 to B - 1, whatever their tensor has: nothing is copied.
        """
        with self.model.autocast(first.device):
            x = _taken(first, first_of)
            for number, block in enumerate(self._blocks):
                if number > 0 or not self._has_first_attention:
                    is_last = self.reuse.last_row and number == len(self._blocks) - 1
                    x = block.attend_itself(x, first_row_only=is_last)
                x = block.attend_memory(x, self._keys_values(number, memory, memory_of))
            return self.model.classify(x[:, 0])

    @property
    def _has_first_attention(self) -> bool:
        """Not worth it with a single block, which needs only the class token's row."""
        return self.reuse.first_attention and not (self.reuse.last_row and len(self._blocks) == 1)

    def _keys_values(self, number: int, memory: Memory, memory_of: Tensor | None) -> KeysValues:
        """(B, L, H, E) each."""
        if memory.keys_values is not None:
            key, value = memory.keys_values[number]
        elif self.reuse.memory:
            key, value = self._blocks[number].keys_values(memory.tokens)
        else:
            return self._blocks[number].keys_values(_taken(memory.tokens, memory_of))
        return _taken(key, memory_of), _taken(value, memory_of)


def _taken(images: Tensor, chosen: Tensor | None) -> Tensor:
    """images[chosen], without a copy where all rows are one image, or (None) each is in its place."""
    if chosen is None:
        return images
    if len(images) == 1:
        return images.expand(len(chosen), *images.shape[1:])
    return images[chosen]
