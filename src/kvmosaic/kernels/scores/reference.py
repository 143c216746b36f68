"""Column sums of causal attention, block of queries by block of queries, in PyTorch."""

import torch
from torch import Tensor

BLOCK = 256
"""Queries at a time: logits of [B, Hq, 256, T] are held."""


def column_sums(query: Tensor, keys: Tensor, scale: float, valid: Tensor, asking: Tensor | None = None) -> Tensor:
    """What each token receives from the queries `asking` (None = all) in a causal attention of T tokens with itself.

    query [B, Hq, T, D], keys [B, H, T, D], valid and asking [B, T] bool (padding neither gives nor receives).
    Returns [B, H, T] float32, the mean over the query heads of a KV head.
    """
    batch, heads, tokens, _ = keys.shape
    position = torch.arange(tokens, device=keys.device)
    asking = valid if asking is None else asking & valid
    rows = asking.any(0).nonzero()[:, 0]
    keys = keys[:, :, None].float()  # [B, H, 1, T, D]
    sums = keys.new_zeros(batch, heads, tokens)
    for some in rows.split(BLOCK):
        stop = int(some[-1]) + 1
        part = query[:, :, some].float().unflatten(1, (heads, -1))  # [B, H, G, block, D]
        logits = part @ keys[:, :, :, :stop].mT * scale
        seen = (position[:stop] <= some[:, None]) & valid[:, None, None, None, :stop]
        logits = logits.masked_fill(~seen, -torch.inf)
        weights = logits.softmax(-1).nan_to_num(0.0) * asking[:, None, None, some, None]
        sums[:, :, :stop] += weights.sum(3).mean(2)
    return sums
