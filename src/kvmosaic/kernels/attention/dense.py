"""Attention over exact tokens with any mask, in PyTorch: for the tokens of the step itself, beside coded stores."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kvmosaic.kernels.attention.partial import Partial, shares

LOGITS_AT_ONCE = 2**24
"""Logits held at a time (64 MiB in float32); longer steps go through in blocks of queries."""


def dense(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None, softcap: float | None = None
) -> Partial:
    """query [B, H, G, T, D] over keys, values [B, H, S, D]; rows of the result are the G * T queries of a KV head.

    mask: None = causal, the last query beside the last key; else [B or 1, 1, T, S], True = attend, or additive floats.
    """
    outs, lses = [], []
    for _, logits in _logits(query, keys, scale, mask, softcap):
        lse = torch.logsumexp(logits, -1)
        outs.append(shares(logits, lse[..., None]) @ values[:, :, None].float())
        lses.append(lse)
    return Partial(torch.cat(outs, 3).flatten(2, 3), torch.cat(lses, 3).flatten(2, 3))


def dense_mass(
    query: Tensor, keys: Tensor, scale: float, mask: Tensor | None, softcap: float | None, lse: Tensor, weight: Tensor
) -> Tensor:
    """[B, H, S] float32, what each key receives, as `mass` for a store: lse [B, H, G * T], weight [B, 1, G * T]."""
    groups, steps = query.shape[2:4]
    lse, weight = (each.unflatten(2, (groups, steps))[..., None] for each in (lse, weight))
    parts = _logits(query, keys, scale, mask, softcap)
    received = [((logits - lse[:, :, :, rows]).exp() * weight[:, :, :, rows]).sum((2, 3)) for rows, logits in parts]
    return torch.stack(received).sum(0)


def dense_peaks(
    query: Tensor, keys: Tensor, scale: float, mask: Tensor | None, softcap: float | None, lse: Tensor, asking: Tensor
) -> Tensor:
    """[B, H, S] float32, the greatest share that any query `asking` [B, T] bool pays to each key; lse [B, H, G * T]."""
    lse = lse.unflatten(2, query.shape[2:4])[..., None]
    asking = asking[:, None, None, :, None]
    parts = _logits(query, keys, scale, mask, softcap)
    peaks = [((logits - lse[:, :, :, rows]).exp() * asking[:, :, :, rows]).amax((2, 3)) for rows, logits in parts]
    return torch.stack(peaks).amax(0)


def _logits(
    query: Tensor, keys: Tensor, scale: float, mask: Tensor | None, softcap: float | None
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of queries and their logits [B, H, G, block, S], masked with -inf."""
    keys, query = keys.float(), query.float()
    steps, slots = query.shape[3], keys.shape[2]
    if mask is None and steps > 1:
        mask = torch.ones(steps, slots, dtype=torch.bool, device=keys.device).tril(slots - steps)[None, None]
    block = max(1, LOGITS_AT_ONCE // (query.shape[:3].numel() * max(slots, 1)))
    for start in range(0, steps, block):
        rows = slice(start, start + block)
        logits = query[:, :, :, rows] @ keys[:, :, None].mT * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if mask is not None:
            part = mask[:, :, None, rows]
            logits = logits.masked_fill(~part, -torch.inf) if part.dtype is torch.bool else logits + part.float()
        yield rows, logits
