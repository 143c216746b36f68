"""What a selection sees, and what it answers."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
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
    place: Tensor  # [B, T] int64, among all tokens that its row has seen; -1 for padding
    visual: Tensor  # [B, T] bool
    frequencies: Tensor | None  # [R], of the rotary embedding, radians a place; None = not known
    whole: Tensor | None = None  # [B] int64, tokens of the prompt so far, with those dropped already; None = none are
    known: Tensor | None = None  # [B, T] bool, whose queries are known, where the others' are zeros; None = all are

    @property
    def valid(self) -> Tensor:
        """[B, T] bool, False for padding."""
        return self.place >= 0

    @property
    def asking(self) -> Tensor:
        """[B, T] bool: the tokens whose queries score."""
        return self.valid if self.known is None else self.valid & self.known


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

    @property
    def sees_visual(self) -> bool:
        """Whether it must be told which tokens are visual."""
        return False

    @property
    def replay(self) -> int | None:
        """How many tokens of the first prompt are fed again at a time, to score them by what that pays to each; None = scores
        come from the prompt's own pass. With it, `assign_replayed` is asked for the first prompt."""
        return None

    def assign_replayed(self, steps: Sequence[Step], scores: Sequence[Tensor]) -> Sequence[Tensor]:
        """`assign` for the first prompt in all layers together, with the scores [B, H, T] float32 that its repetition gave."""
        return [self.assign_scored(step, score) for step, score in zip(steps, scores, strict=True)]

    def assign_scored(self, step: Step, score: Tensor) -> Tensor:
        """`assign` with scores [B, H, T] float32 at hand, for selections that are told them."""
        return self.assign(step)

    @property
    def prunes(self) -> bool:
        """Whether a prompt may be pruned as it comes: what is left of earlier pieces, and the next one, are assigned as a step
        whose rows are single heads."""
        return False

    @property
    def uneven(self) -> bool:
        """Whether the heads of a layer may keep different counts of tokens."""
        return False

    @property
    def sized(self) -> bool:
        """Whether its budget is a size of memory, which is `resolved` when a prompt comes."""
        return False

    def resolved(self, tokens: int, visual: int, nbytes: Callable[["Selection", int], int]) -> "Selection":
        """The same with a count of tokens for a prompt of `tokens`, `visual` of them visual: the greatest with which the
        cache, of `nbytes` of a selection and a length, is no larger than asked. Raises ValueError if what must stay is larger."""
        return self


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


class Order(NamedTuple):
    """In which tokens leave that carry their place and their score. A value, no function: kernels go by it too
    (`kernels/scores/cuda.cu`). Tokens with an infinite score never leave."""

    first: int  # so many of the first tokens never leave,
    recent: int  # nor do so many of the newest
    by_score: bool  # the least score leaves first; else the oldest

    def rank(self, position: Tensor, score: Tensor, present: Tensor) -> Tensor:
        """[B, H, S] each, `present` where a slot holds a token -> float32, the smallest leaves first, the infinite never."""
        newest = position.masked_fill(~present, -1).amax(2, keepdim=True)
        protected = (position < self.first) | (position > newest - self.recent) | score.isinf()
        return (score if self.by_score else position.float()).masked_fill(protected, torch.inf)


class Evicting(Selection):
    """The first prompt sets how many tokens a row may keep; from then on tokens leave as new ones come."""

    @abstractmethod
    def capacity(self, step: Step) -> Tensor:
        """[B] int64, the tokens that each row may keep after this first prompt."""
        ...

    @abstractmethod
    def score(self, step: Step) -> Tensor:
        """[B, H, T] float32, which the first prompt's tokens take with them; infinite for those that never leave."""
        ...

    @abstractmethod
    def protected(self, step: Step) -> Tensor:
        """[B, T] bool: the tokens of a prompt or a later turn that never leave."""
        ...

    @property
    @abstractmethod
    def order(self) -> "Order":
        """In which tokens leave."""
        ...


def places(score: Tensor) -> Tensor:
    """[..., S] -> each entry's place when sorted, highest first; of equals the older token comes first."""
    order = score.sort(dim=-1, descending=True, stable=True).indices
    return torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
