"""Single channels of the rotated keys."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvmosaic.projection.base import Basis, Projection
from kvmosaic.selection.base import Step, places


@dataclass(frozen=True)
class Channels(Basis):
    """index: [B, H, R] int16, the channels that are stored, in their order."""

    index: Tensor

    @property
    def size(self) -> int:
        return self.index.shape[2]

    def shrink(self, x: Tensor) -> Tensor:
        return x.gather(3, self.index.long()[:, :, None].expand(-1, -1, x.shape[2], -1))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield "channels", self.index

    def map(self, change: Callable[[Tensor], Tensor]) -> "Channels":
        return Channels(change(self.index))


@dataclass(frozen=True, kw_only=True)
class QueryDriven(Projection):
    """The channels that contribute most to the logits of the last queries: largest |Q[:, j]| |K[:, j]|.

    That product is the norm of the channel's part of Q K^T, so to keep the largest is the greedy way to leave Q K^T as
    it is. Queries that share a KV head are scored together; ties go to the lower channel.
    pruned: share of the channels that goes, rounded down to whole channels; or channels: how many stay.
    queries: how many of the prompt's last queries score. recent: see `Projection`.
    Raises ValueError for shares outside [0, 1), counts below 1, or if both or neither of the two is given; and, at the first
    prompt, for more channels than a head has.
    Source: ThinK, arXiv:2407.21018, section 3.
    """

    pruned: float | None = None
    channels: int | None = None
    queries: int = 32
    recent: int = 32

    def __post_init__(self) -> None:
        if (self.pruned is None) == (self.channels is None):
            raise ValueError(
                f"say how many key channels go as pruned= (a share) or how many stay as channels= (a count), got {self.pruned} "
                f"and {self.channels}"
            )
        if self.pruned is not None and not 0 <= self.pruned < 1:
            raise ValueError(
                f"pruned is the share of key channels that goes, at least 0 and below 1, got {self.pruned}"
            )
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"channels is how many stay of each key, at least 1, got {self.channels}")
        if self.queries < 1 or self.recent < 0:
            raise ValueError(f"queries must be at least 1 and recent at least 0, got {self.queries} and {self.recent}")

    def size(self, channels: int) -> int:
        if self.channels is None:
            assert self.pruned is not None, "one of the two is set"
            return channels - int(channels * self.pruned)
        if self.channels > channels:
            raise ValueError(f"channels is how many of the head's {channels} stay, got {self.channels}")
        return self.channels

    def nbytes(self, channels: int) -> int:
        return self.size(channels) * torch.int16.itemsize

    def basis(self, step: Step, keep: Tensor) -> Channels:
        newest = step.valid & (step.valid.flip(1).cumsum(1).flip(1) <= self.queries)
        asked = (step.query.float().square() * newest[:, None, :, None]).sum(2)  # [B, Hq, D]
        held = (step.keys.float().square() * keep[..., None]).sum(2)  # [B, H, D]
        power = asked.unflatten(1, (held.shape[1], -1)).sum(2) * held
        chosen = places(power) < self.size(held.shape[2])
        channel = torch.arange(held.shape[2], dtype=torch.int16, device=held.device).expand_as(chosen)
        return Channels(channel[chosen].view(*held.shape[:2], -1))


@dataclass(frozen=True, kw_only=True)
class LargestFirst(Projection):
    """All channels, those of the largest norm over the prompt's keys first, so that a codec can treat them apart (`Split`).

    Source: TurboQuant's outlier channels, arXiv:2504.19874, section 4.3, as in the authors' supplement.
    """

    recent: int = 0

    def size(self, channels: int) -> int:
        return channels

    def nbytes(self, channels: int) -> int:
        return channels * torch.int16.itemsize

    def basis(self, step: Step, keep: Tensor) -> Channels:
        power = (step.keys.float().square() * keep[..., None]).sum(2)
        return Channels(power.sort(dim=-1, descending=True, stable=True).indices.to(torch.int16))
