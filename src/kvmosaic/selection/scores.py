"""How much a token matters, as seen by one forward pass. Larger = keep. No T x T matrix is ever held."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvmosaic.kernels.scores import column_sums
from kvmosaic.selection.base import Step


class Scorer(Protocol):
    """Settings only; padding is neither scored nor does it score."""

    def score(self, step: Step) -> Tensor:
        """[B, H, T] float32: one decision serves the query heads that share a key head."""
        ...


@dataclass(frozen=True)
class Recency:
    """The newest tokens (StreamingLLM's window, arXiv:2309.17453)."""

    def score(self, step: Step) -> Tensor:
        batch, heads, tokens, _ = step.keys.shape
        return torch.arange(tokens, dtype=torch.float32, device=step.keys.device).expand(batch, heads, tokens)


@dataclass(frozen=True)
class AttentionSums:
    """The attention a token has received from all queries, averaged over the query heads of its KV head (H2O,
    arXiv:2306.14048). normalize: divide by the number of queries that could see the token, which takes away the
    advantage of early tokens (ZipCache, arXiv:2405.14256, eq. 8)."""

    normalize: bool = False

    def score(self, step: Step) -> Tensor:
        sums = column_sums(step.query, step.keys, step.scale, step.valid)
        if self.normalize:
            seen_by = step.valid.flip(1).cumsum(1).flip(1).clamp_min(1)
            sums = sums / seen_by[:, None]
        return sums


@dataclass(frozen=True)
class WindowAttention:
    """The attention from the last `window` queries, pooled over `kernel` neighbours (SnapKV, arXiv:2404.14469).

    pooling: "max" (the published settings) or "mean".
    """

    window: int = 32
    kernel: int = 7
    pooling: str = "max"

    def __post_init__(self) -> None:
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"window must be at least 1 and kernel odd, got {self.window} and {self.kernel}")
        if self.pooling not in ("max", "mean"):
            raise ValueError(f"pooling must be 'max' or 'mean', got {self.pooling!r}")

    def score(self, step: Step) -> Tensor:
        newest = step.valid.flip(1).cumsum(1).flip(1) <= self.window
        sums = column_sums(step.query, step.keys, step.scale, step.valid, newest)
        if self.pooling == "max":
            return torch.nn.functional.max_pool1d(sums, self.kernel, stride=1, padding=self.kernel // 2)
        return torch.nn.functional.avg_pool1d(sums, self.kernel, stride=1, padding=self.kernel // 2)


@dataclass(frozen=True)
class ExpectedAttention:
    """The attention that queries like the prompt's will pay, times the length of the value (arXiv:2510.00636).

    Departure: the mean and covariance are those of the rotated queries of the last `queries` tokens, so that no model's
    rotary tables are needed; the paper averages the rotation over the next 512 positions instead.
    """

    queries: int = 512

    def score(self, step: Step) -> Tensor:
        groups = step.query[:, :, -self.queries :].float().unflatten(1, (step.keys.shape[1], -1))  # [B, H, G, Q, D]
        weight = step.valid[:, None, None, -self.queries :, None].float()
        count = weight.sum(3, keepdim=True).clamp_min(1)
        mean = (groups * weight).sum(3, keepdim=True) / count
        spread = (groups - mean) * weight
        covariance = spread.mT @ spread / count  # [B, H, G, D, D]
        keys = step.keys[:, :, None].float()
        logits = (keys @ mean.mT).squeeze(-1) * step.scale
        logits = logits + ((keys @ covariance) * keys).sum(-1) * step.scale**2 / 2
        logits = logits.masked_fill(~step.valid[:, None, None], -torch.inf)
        return logits.softmax(-1).mean(2) * step.values.float().norm(dim=-1)


SCORERS: dict[str, Scorer] = {
    "snapkv": WindowAttention(32, 7, "max"),
    "snapkv_mean": WindowAttention(8, 7, "mean"),  # as XKV's code has it
    "h2o": AttentionSums(),
    "expected_attention": ExpectedAttention(),
}
"""By name, for the methods that share budgets out and leave it open who scores (adakv, xkv)."""


def scorer_of(name: str) -> Scorer:
    """Raises ValueError for a name that SCORERS lacks."""
    if name not in SCORERS:
        raise ValueError(f"no scorer {name!r}. There are: {', '.join(SCORERS)}")
    return SCORERS[name]
