"""What a selection sees, and what it answers."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

DROP = -1
"""The tier of a token that is not kept."""

WAIT = -2
"""The tier of a generated token that waits, exact, until enough have gathered to choose among them."""


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

    Every forward pass of several tokens (a prompt, a chunk of it, a later turn) is assigned by itself. Tokens that are
    generated one at a time stay in the first tier, unless the selection is one of the two kinds below.
    """

    def assign(self, step: Step) -> Tensor:
        """[B, H, T] int8: the index of each token's tier, or DROP. What it says of padding is not read."""
        ...

    def expected(self, tokens: int, layer: int, layers: int) -> tuple[int, ...]:
        """How many of a prompt's tokens each tier will hold per KV head; for arithmetic without tensors."""
        ...


class Gathering(Selection):
    """Generated tokens wait, exact, and are assigned `gather` at a time, by the attention they received meanwhile."""

    gather: int

    @abstractmethod
    def asks(self, seen: int, waiting: int) -> bool:
        """Whether the query of the token at place `seen`, the `waiting`-th that waits, counts."""
        ...

    @abstractmethod
    def assign_waiting(self, score: Tensor, asked: Tensor) -> Tensor:
        """score [B, H, n] float32, attention received; asked [B, n] bool, whose queries counted -> as `assign`."""
        ...


class Evicting(Selection):
    """The first prompt sets how many tokens a row may keep; from then on tokens leave as new ones come."""

    @abstractmethod
    def capacity(self, step: Step) -> Tensor:
        """[B] int64, the tokens that each row may keep after this first prompt."""
        ...

    @abstractmethod
    def score(self, step: Step) -> Tensor:
        """[B, H, T] float32, which the first prompt's tokens take with them."""
        ...

    @abstractmethod
    def assign_scored(self, step: Step, score: Tensor) -> Tensor:
        """`assign` with those scores at hand: they cost as much as the prompt's attention."""
        ...

    @abstractmethod
    def rank(self, position: Tensor, score: Tensor, present: Tensor) -> Tensor:
        """[B, H, S] each, `present` where a slot holds a token -> float32, the smallest leaves first."""
        ...


def places(score: Tensor) -> Tensor:
    """[..., S] -> each entry's place when sorted, highest first; of equals the older token comes first."""
    order = score.sort(dim=-1, descending=True, stable=True).indices
    return torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )


DEFAULT_KEEP = 0.25


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

    @staticmethod
    def of(keep: float | None, tokens: int | None) -> "Budget":
        """As a method's options give it: a quarter of the tokens if neither is given."""
        return Budget(DEFAULT_KEEP if keep is None and tokens is None else keep, tokens)

    def count(self, present: Tensor) -> Tensor:
        """present [...] int64, tokens of a prompt -> how many stay, never more than there are, never fewer than one."""
        if self.tokens is not None:
            return present.clamp_max(self.tokens)
        assert self.keep is not None, "one of the two is set"
        return (present * self.keep).round().to(torch.int64).clamp_min(1).minimum(present)
