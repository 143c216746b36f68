"""Attention over exact tokens with any mask, in PyTorch: for the tokens of the step itself, beside coded stores."""

import torch
from torch import Tensor

from kvmosaic.kernels.attention.partial import Partial

LOGITS_AT_ONCE = 2**24
"""Logits held at a time (64 MiB in float32); longer steps go through in blocks of queries."""


def dense(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None, softcap: float | None = None
) -> Partial:
    """query [B, H, G, T, D] over keys, values [B, H, S, D]; rows of the result are the G * T queries of a KV head.

    mask: None = causal, the last query beside the last key; else [B or 1, 1, T, S], True = attend, or additive floats.
    """
    keys, values, query = keys.float(), values.float(), query.float()
    steps = query.shape[3]
    if mask is None and steps > 1:
        mask = torch.ones(steps, keys.shape[2], dtype=torch.bool, device=keys.device).tril(keys.shape[2] - steps)[
            None, None
        ]
    block = max(1, LOGITS_AT_ONCE // (query.shape[:3].numel() * max(keys.shape[2], 1)))
    outs, lses = [], []
    for start in range(0, steps, block):
        logits = query[:, :, :, start : start + block] @ keys[:, :, None].mT * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if mask is not None:
            part = mask[:, :, None, start : start + block]
            logits = logits.masked_fill(~part, -torch.inf) if part.dtype is torch.bool else logits + part.float()
        lse = torch.logsumexp(logits, -1)
        outs.append((logits - lse[..., None]).exp().nan_to_num(0.0) @ values[:, :, None])
        lses.append(lse)
    return Partial(torch.cat(outs, 3).flatten(2, 3), torch.cat(lses, 3).flatten(2, 3))
