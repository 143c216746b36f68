"""What a projection sees, and what it answers."""

from collections.abc import Callable, Iterator
from typing import Protocol

from torch import Tensor

from kvmosaic.selection.base import Step

NO_KERNEL = "no compiled kernel reads keys of which a projection keeps a part, or in another order"


class Basis(Protocol):
    """The R of D numbers by which a row and KV head knows its keys. A lane shrinks what it encodes; its ring stays whole."""

    @property
    def size(self) -> int:
        """R."""
        ...

    def shrink(self, x: Tensor) -> Tensor:
        """Keys and queries alike, [B, H, n, D] -> [B, H, n, R]: logits are products of two shrunk vectors."""
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]: ...

    def map(self, change: Callable[[Tensor], Tensor]) -> "Basis":
        """After a change of rows (reordering, repeating)."""
        ...


class Projection(Protocol):
    """Settings only; asked once, at a cache's first prompt. What it decides then serves all later tokens.

    recent: how many of the newest keys stay whole where no tier says so (a tier's own window comes first).
    """

    recent: int

    def size(self, channels: int) -> int:
        """R of a head size, for arithmetic without tensors."""
        ...

    def nbytes(self, channels: int) -> int:
        """Of the basis of one row and KV head."""
        ...

    def basis(self, step: Step, keep: Tensor) -> Basis:
        """keep [B, H or 1, T] bool: the tokens that will be stored."""
        ...
