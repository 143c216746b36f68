"""Keep the tokens that score highest, head by head."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from kvmosaic.selection.base import DROP, Evicting, Order, Selection, Step, places
from kvmosaic.selection.budget import Budget
from kvmosaic.selection.layers import LayerBudgets
from kvmosaic.selection.scores import Recency, Reconstruction, Scorer


@dataclass(frozen=True, kw_only=True)
class TopTokens(Selection):
    """The protected tokens, the newest `recent` ones, and the best by `scorer` up to the budget; the rest is dropped.

    sinks: the first tokens of a sequence, which a method itself protects; the budget may protect more.
    layers: how the budget is shared out between layers; None = alike.
    head_floor: None = every head keeps as many; a share = the heads of a layer get that share of the mean alike, and compete
        for the rest by score (AdaKV, arXiv:2407.11550; its alpha); with a scorer that replays, the heads of all layers.
    What must stay (protected, recent) stays even in a layer or a later turn whose share is smaller; a first prompt with more
    protected tokens than its budget raises ValueError.
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
        if self.layers is not None and self.replay is not None:
            raise ValueError(
                "where a prompt is fed again, layers compete, so that no rule shares its budget out between them"
            )
        if self.budget.tokens is not None and self.budget.tokens < self._first + self.recent:
            raise ValueError(
                f"a budget of {self.budget.tokens} tokens cannot hold the {self._first} first and {self.recent} recent tokens "
                "that always stay. Raise tokens= or protect fewer"
            )

    @property
    def _first(self) -> int:
        return max(self.sinks, self.budget.protect.first)

    @property
    def sees_visual(self) -> bool:
        return self.budget.protect.by_kind

    @property
    def prunes(self) -> bool:
        return not self.uneven and self.replay is None

    @property
    def uneven(self) -> bool:
        return self.head_floor is not None

    @property
    def sized(self) -> bool:
        return self.budget.gigabytes is not None

    def resolved(self, tokens: int, visual: int, nbytes: Callable[[Selection, int], int]) -> Self:
        if self.budget.gigabytes is None:
            return self
        room, protect = self.budget.gigabytes * 1e9, self.budget.protect
        by_kind = visual * protect.visual + (tokens - visual) * protect.text
        least = min(tokens, max(1, self._first + self.recent, by_kind))
        if nbytes(self._of(least), tokens) > room:
            raise ValueError(
                f"gigabytes={self.budget.gigabytes} cannot hold the {least} tokens of a prompt of {tokens} that always stay "
                f"({by_kind or self._first} protected, {self.recent} recent): they take {nbytes(self._of(least), tokens) / 1e9:.3g}. "
                "Raise gigabytes=, protect fewer, or keep tokens in fewer bits"
            )
        low, high = least, self._most(tokens) + 1
        while high - low > 1:
            middle = (low + high) // 2
            fits = nbytes(self._of(middle), max(middle, tokens)) <= room
            low, high = (middle, high) if fits else (low, middle)
        return self._of(low)

    def _most(self, tokens: int) -> int:
        """The greatest budget that means something for a prompt."""
        return tokens

    def _of(self, tokens: int) -> Self:
        return replace(self, budget=replace(self.budget, tokens=tokens, gigabytes=None))

    @property
    def replay(self) -> int | None:
        return self.scorer.replay if isinstance(self.scorer, Reconstruction) else None

    def assign(self, step: Step) -> Tensor:
        if self.replay is not None:  # a later turn, which is not fed again: it stays whole
            return torch.zeros(step.keys.shape[:3], dtype=torch.int8, device=step.keys.device)
        return self.assign_scored(step, self.scorer.score(step))

    def assign_replayed(self, steps: Sequence[Step], scores: Sequence[Tensor]) -> Sequence[Tensor]:
        together = torch.cat([score.to(scores[0].device) for score in scores], 1)  # as if one layer had all heads
        tiers = self.assign_scored(steps[0], together).split([score.shape[1] for score in scores], 1)
        return [tier.to(score.device) for tier, score in zip(tiers, scores, strict=True)]

    def assign_scored(self, step: Step, score: Tensor) -> Tensor:
        """`assign` with the scores at hand; score [B, H, T] float32."""
        present = step.valid.sum(1)  # [B]
        whole = present if step.whole is None else step.whole
        budget = self.budget.count(whole)
        asked = self.budget.protect.among(step)
        short = (asked.sum(1) > budget) & (step.place == 0).any(1)
        if bool(short.any()):
            row = int(short.nonzero()[0, 0])
            raise ValueError(
                f"a budget of {int(budget[row])} tokens ({self.budget}) cannot hold the {int(asked[row].sum())} protected tokens of "
                f"a prompt of {int(present[row])}. Raise the budget or protect fewer"
            )
        newest = step.valid.flip(1).cumsum(1).flip(1) <= self.recent
        protected = (asked | (step.place < self.sinks) | newest) & step.valid
        score = score.masked_fill(protected[:, None], torch.inf)
        score = score.masked_fill(~step.valid[:, None], -torch.inf)
        must = protected.sum(1)
        count = torch.minimum(torch.maximum(self._shared(budget, whole, step.layer, step.layers), must), present)  # [B]
        keep = count[:, None].expand(-1, score.shape[1])
        if self.head_floor is not None:
            keep = self._by_head(score, count, must)
        return torch.where(places(score) < keep[..., None], 0, DROP).to(torch.int8)

    def expected(self, tokens: int, layer: int, layers: int) -> tuple[int, ...]:
        if self.sized:
            return (tokens,)  # until it is resolved
        present = torch.tensor([tokens])
        count = self._shared(self.budget.count(present), present, layer, layers)
        return (min(tokens, max(int(count), self._first + self.recent)),)

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
        place = places(contest.mT.flatten(1))  # of equals the better placed in its own head comes first
        won = place.view(batch, tokens, heads).mT < ((count - floor) * heads)[:, None, None]
        return floor[:, None] + (won & contest.isfinite()).sum(-1)


@dataclass(frozen=True, kw_only=True)
class HeavyHitters(TopTokens, Evicting):
    """`TopTokens` that goes on: as a new token comes, the one that scores least leaves. Scores add up attention; with
    `Recency` they are places. Heads do not compete (no head_floor)."""

    head_floor: None = None

    def resolved(self, tokens: int, visual: int, nbytes: Callable[[Selection, int], int]) -> Self:
        found = super().resolved(tokens, visual, nbytes)
        if found is self or found.budget.tokens is None:
            return found
        # a token comes before another leaves: without a slot to spare that would open a block of 32
        spare = (found.budget.tokens + 1) // 32 * 32 - 1
        return self._of(spare) if spare >= max(1, self._first + self.recent) else found

    def _most(self, tokens: int) -> int:
        return max(tokens, 2**32)  # what is generated counts, too

    def score(self, step: Step) -> Tensor:
        return self.scorer.score(step).masked_fill(self.protected(step)[:, None], torch.inf)

    def protected(self, step: Step) -> Tensor:
        return self.budget.protect.among(step)

    def capacity(self, step: Step) -> Tensor:
        present = step.valid.sum(1)
        wanted = torch.full_like(present, self.budget.tokens) if self.budget.tokens else self.budget.count(present)
        return self._shared(wanted, present, step.layer, step.layers).clamp_min(self._first + self.recent)

    @property
    def order(self) -> Order:
        return Order(self._first, self.recent, by_score=not isinstance(self.scorer, Recency))
