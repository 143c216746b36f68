"""What a selection sees, and what it answers."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

DROP = -1
"""The tier of a token that is not kept."""


class Step(NamedTuple):
    """One layer in one forward pass over several tokens, after its attention."""

    layer: int
    layers: int  # how many the model has
    query: Tensor  # [B, Hq, T, D], rotated
    keys: Tensor  # [B, H, T, D], rotated
    values: Tensor  # [B, H, T, D]
    scale: float  # of the logits
    valid: Tensor  # [B, T] bool, False for padding


class Selection(Protocol):
    """Settings only. Pure: the same step gives the same tiers; ties go to the older token.

    while_decoding: False = asked about every forward pass of several tokens (a prompt, a chunk of it, a later turn), each
        by itself; tokens that are generated one at a time stay. True = the first prompt sets how many tokens a row
        may keep, and from then on tokens leave as new ones come.
    """

    while_decoding: bool

    def assign(self, step: Step) -> Tensor:
        """[B, H, T] int8: 0 for a token that stays, or DROP. What it says of padding is not read."""
        ...

    def capacity(self, step: Step) -> Tensor:
        """[B] int64, the tokens that each row may keep after this first prompt; only with while_decoding."""
        ...

    def score(self, step: Step) -> Tensor:
        """[B, H, T] float32, which the first prompt's tokens take with them; only with while_decoding."""
        ...

    def rank(self, position: Tensor, score: Tensor, present: Tensor) -> Tensor:
        """[B, H, S] each, `present` where a slot holds a token -> float32, the smallest leaves first."""
        ...


@dataclass(frozen=True)
class Budget:
    """How many tokens of a prompt stay in each KV head: a share of them (`keep`) or a count (`tokens`), one of the two.

    Raises ValueError if both or neither is given, for a share outside (0, 1], or a count below 1.
    """

    keep: float | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.tokens is None):
            raise ValueError(
                f"give a budget as keep= (a share) or as tokens= (a count), got {self.keep} and {self.tokens}"
            )
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(f"keep is the share of tokens that stays, above 0 and at most 1, got {self.keep}")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens is how many stay in each head, at least 1, got {self.tokens}")

    def count(self, present: Tensor) -> Tensor:
        """present [...] int64, tokens of a prompt -> how many stay, never more than there are, never fewer than one."""
        if self.tokens is not None:
            return present.clamp_max(self.tokens)
        assert self.keep is not None, "one of the two is set"
        return (present * self.keep).round().to(torch.int64).clamp_min(1).minimum(present)
