"""What every codec promises: arithmetic between numbers and codes. Where the codes lie is the store's business."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Packed = dict[str, Tensor]
"""The parts of an encoded run of tokens: each [B, H, entries, width], entries as the part's `every` says."""


@dataclass(frozen=True)
class Part:
    """One of the tensors that a codec writes.

    every: how many tokens share an entry: 1 (per token), a group size, or None (one entry for a whole run of tokens
        that were encoded together).
    width: numbers in an entry.
    dtype: as stored; None = the dtype of the keys and values.
    bits: of each number; below 8 the store packs them (`kernels/layout.py`), so `dtype` is then uint8.
    kind: how a report counts it.
    rows: bytes that lie token by token as the codec wrote them, and not in the blocks that kernels read.
    looked_up: codes that stand for numbers of a table.
    """

    every: int | None
    width: int
    dtype: torch.dtype | None
    bits: int
    kind: str
    rows: bool = False
    looked_up: bool = False

    @property
    def blocked(self) -> bool:
        """Whether the store packs it into blocks (`kernels/layout.py`)."""
        return self.dtype is torch.uint8 and not self.rows


class Codec(Protocol):
    """Settings only: frozen, hashable, shared between layers. All tensors are [B, H, tokens, channels].

    `logits` and `mix` are attention's two products over the encoded form; a codec overrides them where its codes can
    be used as they are. `encode` sees whole runs: `valid` [B, H, tokens] (None = all) marks the tokens of ragged rows.
    """

    @property
    def unit(self) -> int:
        """`encode` takes tokens in multiples of this."""
        return 1

    def parts(self, channels: int) -> Mapping[str, Part]: ...

    def learned(self) -> Mapping[str, Tensor]:
        """What was learned from data and is read with the codes; all caches of a process share it, and each counts it."""
        return {}

    def to(self, device: torch.device) -> "Codec":
        """The codec with what it learned on that device."""
        return self

    def of_head(self, head: int) -> "Codec":
        """The codec for that KV head alone."""
        return self

    def encode(self, x: Tensor, valid: Tensor | None) -> Packed: ...

    def decode(self, packed: Packed) -> Tensor: ...

    def logits(self, query: Tensor, packed: Packed) -> Tensor:
        """query [B, H, M, D] float32 -> [B, H, M, tokens] float32."""
        return query @ self.decode(packed).mT

    def mix(self, weights: Tensor, packed: Packed) -> Tensor:
        """weights [B, H, M, tokens] float32 -> [B, H, M, D] float32."""
        return weights @ self.decode(packed)
