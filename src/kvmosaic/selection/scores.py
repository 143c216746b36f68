"""How much a token matters, as seen by one forward pass. Larger = keep. No T x T matrix is ever held."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvmosaic.errors import UnsupportedModel
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
        sums = column_sums(step.query, step.keys, step.scale, step.valid, step.asking)
        if self.normalize:
            seen_by = step.asking.flip(1).cumsum(1).flip(1).clamp_min(1)
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
        sums = column_sums(step.query, step.keys, step.scale, step.valid, newest & step.asking)
        if self.pooling == "max":
            return torch.nn.functional.max_pool1d(sums, self.kernel, stride=1, padding=self.kernel // 2)
        return torch.nn.functional.avg_pool1d(sums, self.kernel, stride=1, padding=self.kernel // 2)


@dataclass(frozen=True)
class ExpectedAttention:
    """The attention that queries like the prompt's will pay, on average over the `future` places that come next, times the
    length of the value (arXiv:2510.00636).

    The queries' mean and covariance are taken before their rotation, without those of the first four tokens, and then
    turned to the places to come. epsilon: added to the attention, so that values count by themselves.
    Departures: the covariance is that of the turned queries, which the turning itself spreads (the code turns it by the mean
    rotation: ranks of random keys then agree with real ones by 0.84 to 0.94 instead of 0.98 to 0.99); places are counted
    token by token, which those of pictures are not in every model (Qwen-VL).
    Raises UnsupportedModel if the model's rotation is not known.
    """

    future: int = 512
    epsilon: float = 0.01

    def __post_init__(self) -> None:
        if self.future < 1 or self.epsilon < 0:
            raise ValueError(
                f"future is how many places lie ahead, at least 1, and epsilon at least 0, got {self.future} and {self.epsilon}"
            )

    def score(self, step: Step) -> Tensor:
        if step.frequencies is None:
            raise UnsupportedModel(
                "expected attention turns queries by the model's rotary embedding, and this model's is not known (it needs "
                "rotary_emb.inv_freq, applied to halves). Use another scorer, e.g. snapkv"
            )
        valid, place = step.valid, step.place.clamp_min(0)
        asking = step.asking & ((step.place >= 4) | ~(step.place >= 4).any(1, keepdim=True))
        weight = asking[:, None, None, :, None].float()
        angle = place[..., None] * step.frequencies  # [B, T, R]
        query = turned(step.query.float(), angle.cos()[:, None], -angle.sin()[:, None])
        query = query.unflatten(1, (step.keys.shape[1], -1))  # [B, H, G, T, D], as before their rotation
        count = weight.sum(3, keepdim=True).clamp_min(1)
        mean = (query * weight).sum(3, keepdim=True) / count
        spread = (query - mean) * weight
        covariance = spread.mT @ spread / count  # [B, H, G, D, D]
        moment = covariance + mean.mT @ mean
        ahead = torch.linspace(1, self.future, min(self.future, 64), device=place.device)  # that many tell enough
        angle = (ahead[:, None, None] + place.amax(1)[:, None]) * step.frequencies  # [places, B, R]
        turns = [(each.cos()[:, None, None, None], each.sin()[:, None, None, None]) for each in angle]
        mean = torch.stack([turned(mean, *turn) for turn in turns]).mean(0)
        moment = torch.stack([turned(turned(moment, *turn).mT, *turn) for turn in turns]).mean(0)
        covariance = moment - mean.mT @ mean
        keys = step.keys[:, :, None].float()
        logits = (keys @ mean.mT).squeeze(-1) * step.scale
        logits = logits + ((keys @ covariance) * keys).sum(-1) * step.scale**2 / 2
        logits = logits.masked_fill(~valid[:, None, None], -torch.inf)
        return (logits.softmax(-1).mean(2) + self.epsilon) * step.values.float().norm(dim=-1)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., D] with its first 2 R numbers turned in pairs (i, i + R); cos, sin [..., R]."""
    half = cos.shape[-1]
    one, other, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([one * cos - other * sin, other * cos + one * sin, rest], -1)


@dataclass(frozen=True)
class Reconstruction:
    """The greatest share of attention that a token receives while the prompt is fed again after itself, `replay` tokens at a
    time, from the repetition of its own piece (KVzip, arXiv:2505.23416). Measured by the hook (`hooks/replay.py`); the
    tokens of later turns all score alike.
    """

    replay: int = 2000

    def __post_init__(self) -> None:
        if self.replay < 1:
            raise ValueError(f"replay is how many tokens are fed again at a time, at least 1, got {self.replay}")

    def score(self, step: Step) -> Tensor:
        return torch.zeros(step.keys.shape[:3], device=step.keys.device)


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
