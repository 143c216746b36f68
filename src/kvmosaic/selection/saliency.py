"""Two tiers by saliency: the attention a token receives, divided by how many queries could have paid it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvmosaic.kernels.scores import column_sums
from kvmosaic.selection.base import DROP, Gathering, Step, places
from kvmosaic.selection.budget import UNPROTECTED, Protect


@dataclass(frozen=True, kw_only=True)
class Saliency(Gathering):
    """The tokens that a few probe queries find most salient go to tier 0, the others to tier 1.

    share: the part of the tokens that is salient; or mass: as many are as receive this part of all attention, layer by
        layer. One of the two.
    by_head: each KV head chooses for itself; else all choose together, and the newest token is always salient.
    drop: the others are not kept.
    protect: tokens of prompts that are salient whatever they receive, even if that makes them more than asked.
    probes: the newest queries that score, and the others at random: two shares of the tokens, or two counts.
    gather: generated tokens wait, exact, until this many have come, and are chosen among by probes of the same share.
    released: divide as ZipCache's code does, by the queries of the full matrix instead of by the probes that see the
        token, which favours new tokens.
    seed: of the random probes, which depend on the length alone, so that a row is treated alike in every batch.
    Sources: ZipCache, arXiv:2405.14256, eq. 8 and Algorithms 2 and 3; ZipVL, arXiv:2410.08584, eq. 6 to 9 (mass).
    """

    share: float | None = None
    mass: float | None = None
    by_head: bool = True
    drop: bool = False
    protect: Protect = UNPROTECTED
    probes: tuple[float, float] | tuple[int, int] = (0.05, 0.05)
    gather: int = 100
    released: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.share is None) == (self.mass is None):
            raise ValueError(f"give the salient part as share= or as mass=, got {self.share} and {self.mass}")
        if self.share is not None and not 0 <= self.share <= 1:
            raise ValueError(f"share is the part of the tokens that is salient, between 0 and 1, got {self.share}")
        if self.mass is not None and not 0 < self.mass <= 1:
            raise ValueError(f"mass is the part of the attention that is kept, above 0 and at most 1, got {self.mass}")
        if min(self.probes) < 0 or sum(self.probes) <= 0:
            raise ValueError(f"probes are queries that score, some at least, got {self.probes[0]} and {self.probes[1]}")
        if self.gather < 1:
            raise ValueError(f"gather is how many generated tokens wait, at least 1, got {self.gather}")

    def assign(self, step: Step) -> Tensor:
        asking = self._probes(step.valid)
        sums = column_sums(step.query, step.keys, step.scale, step.valid, asking)
        return self._tiers(sums, step.valid if self.released else asking, step.valid, self.protect.among(step))

    @property
    def sees_visual(self) -> bool:
        return self.protect.by_kind

    def asks(self, seen: int, waiting: int) -> bool:
        newest, others = self._counts(self.gather)
        if self.gather - waiting <= newest:
            return True
        draw = torch.rand((), generator=torch.Generator().manual_seed(self.seed + seen)).item()
        return draw < others / (self.gather - newest)

    def assign_waiting(self, score: Tensor, asked: Tensor) -> Tensor:
        every = torch.ones_like(asked)
        return self._tiers(score, asked, every, ~every)

    def expected(self, tokens: int, layer: int, layers: int) -> tuple[int, ...]:
        """With `mass` the prompt decides: all tokens are counted as salient, which no prompt exceeds."""
        salient = tokens if self.share is None else round(self.share * tokens)
        return (salient,) if self.drop else (salient, tokens - salient)

    def _tiers(self, sums: Tensor, asking: Tensor, valid: Tensor, protected: Tensor) -> Tensor:
        heads = sums.shape[1]
        if not self.by_head:
            sums = sums.mean(1, keepdim=True)
        seen_by = asking.flip(1).cumsum(1).flip(1)
        # a token that no probe could see has no score: it ranks last
        score = torch.where(seen_by[:, None] > 0, sums / seen_by[:, None].clamp_min(1), -1.0)
        if not self.by_head:
            score[..., -1] = torch.inf  # rows are padded on the left: the token that the next one follows from
        score = score.masked_fill(protected[:, None], torch.inf)
        score = score.masked_fill(~valid[:, None], -torch.inf)
        if self.mass is None:
            assert self.share is not None, "one of the two is set"
            salient = (valid.sum(1) * self.share).round().to(torch.int64)[:, None, None]
        else:  # the count comes from the plain sums, the choice from the normalized ones
            ordered = sums.sort(dim=-1, descending=True).values.cumsum(-1)
            salient = (ordered < self.mass * ordered[..., -1:]).sum(-1, keepdim=True) + 1
        salient = salient.maximum(score.isposinf().sum(-1, keepdim=True))
        others = DROP if self.drop else 1
        return torch.where(places(score) < salient, 0, others).to(torch.int8).expand(-1, heads, -1)

    def _counts(self, present: int) -> tuple[int, int]:
        """Probes among `present` tokens: the newest (one at least), and others."""
        newest, others = (part if isinstance(part, int) else round(present * part) for part in self.probes)
        newest = min(present, max(1, newest))
        return newest, min(others, present - newest)

    def _probes(self, valid: Tensor) -> Tensor:
        """[B, T] bool: the newest and some others of each row's tokens."""
        asking = torch.zeros_like(valid)
        for row, present in zip(asking, valid.sum(1).tolist(), strict=True):
            newest, others = self._counts(present)
            draw = torch.Generator().manual_seed(self.seed + present)
            row[len(row) - present + torch.randperm(present - newest, generator=draw)[:others]] = True
            row[len(row) - newest :] = True
        return asking & valid
