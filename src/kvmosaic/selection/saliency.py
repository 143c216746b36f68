"""Two tiers by saliency: the attention a token receives, divided by how many queries could have paid it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvmosaic.kernels.scores import column_sums
from kvmosaic.selection.base import Gathering, Step, places


@dataclass(frozen=True, kw_only=True)
class Saliency(Gathering):
    """The `share` of tokens that a few probe queries find most salient go to tier 0, the others to tier 1.

    probes: share of the queries that score: the newest and as many others at random (at least one newest).
    gather: generated tokens wait, exact, until this many have come, and are chosen among by probes of the same share.
    released: divide as the released code does, by the queries of the full matrix instead of by the probes that see the
        token, which favours new tokens.
    seed: of the random probes, which depend on the length alone, so that a row is treated alike in every batch.
    Source: ZipCache, arXiv:2405.14256, eq. 8 and Algorithms 2 and 3.
    """

    share: float
    probes: float = 0.1
    gather: int = 100
    released: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is the part of the tokens that is salient, between 0 and 1, got {self.share}")
        if not 0 < self.probes <= 1:
            raise ValueError(f"probes is the part of the queries that scores, above 0 and at most 1, got {self.probes}")
        if self.gather < 1:
            raise ValueError(f"gather is how many generated tokens wait, at least 1, got {self.gather}")

    def assign(self, step: Step) -> Tensor:
        asking = self._probes(step.valid)
        sums = column_sums(step.query, step.keys, step.scale, step.valid, asking)
        return self._tiers(sums, step.valid if self.released else asking, step.valid)

    def asks(self, seen: int, waiting: int) -> bool:
        newest = max(1, round(self.gather * self.probes / 2))
        if self.gather - waiting <= newest:
            return True
        rest = (self.probes * self.gather - newest) / (self.gather - newest)
        return torch.rand((), generator=torch.Generator().manual_seed(self.seed + seen)).item() < rest

    def assign_waiting(self, score: Tensor, asked: Tensor) -> Tensor:
        return self._tiers(score, asked, torch.ones_like(asked))

    def expected(self, tokens: int, layer: int, layers: int) -> tuple[int, ...]:
        salient = round(self.share * tokens)
        return salient, tokens - salient

    def _tiers(self, sums: Tensor, asking: Tensor, valid: Tensor) -> Tensor:
        seen_by = asking.flip(1).cumsum(1).flip(1)
        # a token that no probe could see has no score: it ranks last
        score = torch.where(seen_by[:, None] > 0, sums / seen_by[:, None].clamp_min(1), -1.0)
        score = score.masked_fill(~valid[:, None], -torch.inf)
        salient = (valid.sum(1) * self.share).round().to(torch.int64)[:, None, None]
        return (places(score) >= salient).to(torch.int8)

    def _probes(self, valid: Tensor) -> Tensor:
        """[B, T] bool: the newest and some others of each row's tokens."""
        asking = torch.zeros_like(valid)
        for row, present in zip(asking, valid.sum(1).tolist(), strict=True):
            newest = min(present, max(1, round(present * self.probes / 2)))
            others = min(present - newest, round(present * self.probes) - newest)
            draw = torch.Generator().manual_seed(self.seed + present)
            chosen = torch.randperm(present - newest, generator=draw)[: max(0, others)]
            row[-newest:] = True  # rows are padded on the left
            row[len(row) - present + chosen] = True
        return asking & valid
