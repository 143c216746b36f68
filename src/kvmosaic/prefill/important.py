"""A prompt's attention among its important tokens alone."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvmosaic.selection.base import Step


class Prefill(Protocol):
    """Settings only; asked for the first prompt of a cache, after the selection has given each token its tier."""

    def attend(self, step: Step, tier: Tensor) -> Tensor:
        """tier [B, H, T] int8 -> the attention's output, [B, T, Hq, D] in the query's dtype."""
        ...


@dataclass(frozen=True)
class AmongImportant(Prefill):
    """Causal attention among the tokens of tier 0, the rest gets zeros: such a token keeps its residual stream and goes
    through the MLP, and the next layer chooses anew. For p of n tokens the cost falls to (p/n)^2.

    Needs a selection with one set of tokens for all heads (`Saliency(by_head=False)`).
    Source: ZipVL, arXiv:2410.08584, Algorithm 1.
    """

    def attend(self, step: Step, tier: Tensor) -> Tensor:
        batch, query_heads, tokens, _ = step.query.shape
        groups = query_heads // step.keys.shape[1]
        out = step.query.new_zeros(batch, tokens, query_heads, step.values.shape[3])
        important = (tier[:, 0] == 0) & step.valid
        for row, chosen in enumerate(important):
            kept = chosen.nonzero()[:, 0]
            query, keys, values = (each[row : row + 1, :, kept] for each in (step.query, step.keys, step.values))
            mixed = torch.nn.functional.scaled_dot_product_attention(
                query, keys, values, is_causal=True, scale=step.scale, enable_gqa=groups > 1
            )
            out[row, kept] = mixed[0].transpose(0, 1)
        return out
