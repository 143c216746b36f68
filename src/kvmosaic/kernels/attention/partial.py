"""Attention over some of the tokens, and the exact merge of several such parts."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """Attention over some of the tokens. A row over no tokens has out 0 and lse -inf."""

    out: Tensor  # [B, H, M, D] float32
    lse: Tensor  # [B, H, M] float32, log-sum-exp of the logits


def shares(logits: Tensor, lse: Tensor) -> Tensor:
    """exp(logits - lse): 0 where there are no tokens at all (lse -inf), NaN where a logit was NaN."""
    return (logits - lse.clamp_min(torch.finfo(torch.float32).min)).exp()


def merge(partials: Sequence[Partial]) -> Partial:
    """Attention over all the tokens of several parts; exact, whatever the parts."""
    if len(partials) == 1:
        return partials[0]
    lse = torch.logsumexp(torch.stack([part.lse for part in partials]), 0)
    weights = [shares(part.lse, lse)[..., None] for part in partials]
    out = weights[0] * partials[0].out
    for weight, part in zip(weights[1:], partials[1:], strict=True):
        out = out + weight * part.out
    return Partial(out, lse)
