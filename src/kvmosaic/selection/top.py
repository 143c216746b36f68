"""Keep the tokens that score highest, head by head."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvmosaic.selection.base import DROP, Budget, Evicting, Selection, Step, places
from kvmosaic.selection.layers import LayerBudgets
from kvmosaic.selection.scores import Recency, Scorer


@dataclass(frozen=True, kw_only=True)
class TopTokens(Selection):
    """The first `sinks` tokens, the newest `recent` ones, and the best by `scorer` up to the budget; the rest is dropped.

    layers: how the budget is shared out between layers; None = alike.
    head_floor: None = every head keeps as many; a share = heads get that share of the mean alike, and compete for the
        rest by score (AdaKV, arXiv:2407.11550; its alpha).
    What must stay (`sinks`, `recent`) stays even if the budget is smaller.
    """

    scorer: Scorer
    budget: Budget
    sinks: int = 0
    recent: int = 0
    layers: LayerBudgets | None = None
    head_floor: float | None = None

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.recent < 0:
            raise ValueError(f"sinks and recent are counts of tokens, got {self.sinks} and {self.recent}")
        if self.head_floor is not None and not 0 <= self.head_floor <= 1:
            raise ValueError(f"head_floor is a share of the mean budget, between 0 and 1, got {self.head_floor}")
        if self.budget.tokens is not None and self.budget.tokens < self.sinks + self.recent:
            raise ValueError(
                f"a budget of {self.budget.tokens} tokens cannot hold the {self.sinks} sinks and {self.recent} recent tokens "
                "that always stay. Raise tokens= or protect fewer"
            )

    def assign(self, step: Step) -> Tensor:
        return self.assign_scored(step, self.scorer.score(step))

    def assign_scored(self, step: Step, score: Tensor) -> Tensor:
        """`assign` with the scores at hand; score [B, H, T] float32."""
        present = step.valid.sum(1)  # [B]
        rank = step.valid.cumsum(1) - 1  # place among the row's tokens
        protected = (rank < self.sinks) | (rank >= present[:, None] - self.recent)
        score = score.masked_fill(protected[:, None], torch.inf)
        score = score.masked_fill(~step.valid[:, None], -torch.inf)
        must = (protected & step.valid).sum(1)
        count = torch.minimum(
            torch.maximum(self._shared(self.budget.count(present), present, step.layer, step.layers), must), present
        )  # [B]
        keep = count[:, None].expand(-1, step.keys.shape[1])
        if self.head_floor is not None:
            keep = self._by_head(score, count, must)
        return torch.where(places(score) < keep[..., None], 0, DROP).to(torch.int8)

    def expected(self, tokens: int, layer: int, layers: int) -> tuple[int, ...]:
        present = torch.tensor([tokens])
        count = self._shared(self.budget.count(present), present, layer, layers)
        return (min(tokens, max(int(count), self.sinks + self.recent)),)

    def _shared(self, count: Tensor, present: Tensor, layer: int, layers: int) -> Tensor:
        """[B] tokens that one layer keeps, of `count` in the mean and `present` in all."""
        if self.layers is None:
            return count
        keep = (count / present.clamp_min(1)).tolist()
        share = [self.layers.share(each, layer, layers) for each in keep]
        return (present * torch.tensor(share, device=present.device)).round().to(torch.int64)

    def _by_head(self, score: Tensor, count: Tensor, must: Tensor) -> Tensor:
        """[B, H]: how many each head keeps, H * count in all: its floor, and what it wins against the others."""
        assert self.head_floor is not None, "only asked for with a floor"
        batch, heads, tokens = score.shape
        floor = torch.maximum((count * self.head_floor).to(torch.int64), must)
        ranked = score.sort(dim=-1, descending=True, stable=True).values
        contest = ranked.masked_fill(torch.arange(tokens, device=score.device) < floor[:, None, None], -torch.inf)
        place = places(contest.flatten(1))
        won = place.view(batch, heads, tokens) < ((count - floor) * heads)[:, None, None]
        return floor[:, None] + (won & contest.isfinite()).sum(-1)


@dataclass(frozen=True, kw_only=True)
class HeavyHitters(TopTokens, Evicting):
    """`TopTokens` that goes on: as a new token comes, the one that scores least leaves. Scores add up attention; with
    `Recency` they are places. Heads do not compete (no head_floor)."""

    head_floor: None = None

    def score(self, step: Step) -> Tensor:
        return self.scorer.score(step)

    def capacity(self, step: Step) -> Tensor:
        present = step.valid.sum(1)
        wanted = torch.full_like(present, self.budget.tokens) if self.budget.tokens else self.budget.count(present)
        return self._shared(wanted, present, step.layer, step.layers).clamp_min(self.sinks + self.recent)

    def rank(self, position: Tensor, score: Tensor, present: Tensor) -> Tensor:
        newest = position.masked_fill(~present, -1).amax(2, keepdim=True)
        protected = (position < self.sinks) | (position > newest - self.recent)
        by = position.float() if isinstance(self.scorer, Recency) else score
        return by.masked_fill(protected, torch.inf)
