"""What a method sees of one layer when it is calibrated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvmosaic.errors import NotFinite


@dataclass(frozen=True)
class Side:
    """Keys or values of one layer.

    numbers: [H, N, D] float32, the tokens of all sequences one after another.
    weights: [H, N, D] float32, the squared gradient of the loss at each number (the diagonal of its Fisher information).
    """

    numbers: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        if not bool(self.numbers.isfinite().all() & self.weights.isfinite().all()):
            raise NotFinite(
                "the keys, the values or their gradients hold NaN or infinity. Check the model's weights, and try --dtype float32"
            )

    def __getitem__(self, tokens: Tensor) -> Side:
        """Of some tokens: a mask [N]."""
        return Side(self.numbers[:, tokens], self.weights[:, tokens])

    def to(self, device: torch.device) -> Side:
        return Side(self.numbers.to(device), self.weights.to(device))


@dataclass(frozen=True)
class Sample:
    """One layer on the sequences that it is calibrated on.

    keys: as the cache gets them, rotated. unrotated: the keys before the rotary positions; None for a model without.
    place: [N] int64, of each token in its sequence.
    """

    keys: Side
    values: Side
    unrotated: Side | None
    place: Tensor

    def __len__(self) -> int:
        return len(self.place)

    def to(self, device: torch.device) -> Sample:
        return Sample(
            self.keys.to(device),
            self.values.to(device),
            self.unrotated and self.unrotated.to(device),
            self.place.to(device),
        )

    def after(self, first: int) -> Sample:
        """Without the first tokens of each sequence."""
        rest = self.place >= first
        unrotated = None if self.unrotated is None else self.unrotated[rest]
        return Sample(self.keys[rest], self.values[rest], unrotated, self.place[rest])

    @staticmethod
    def join(parts: list[Sample]) -> Sample:
        """Of several sequences."""

        def side(each: list[Side]) -> Side:
            return Side(torch.cat([one.numbers for one in each], 1), torch.cat([one.weights for one in each], 1))

        unrotated = [part.unrotated for part in parts if part.unrotated is not None]
        return Sample(
            side([part.keys for part in parts]),
            side([part.values for part in parts]),
            side(unrotated) if unrotated else None,
            torch.cat([part.place for part in parts]),
        )
