"""Column sums of causal attention, block of queries by block of queries, in PyTorch."""

import torch
from torch import Tensor

BLOCK = 256
"""Queries at a time: logits of [B, Hq, 256, T] are held."""


def column_sums(query: Tensor, keys: Tensor, scale: float, valid: Tensor, rows: int | None = None) -> Tensor:
    """What each token receives from the last `rows` queries (None = all) of a causal attention of T tokens with itself.

    query [B, Hq, T, D], keys [B, H, T, D], valid [B, T] bool (False for padding, which neither gives nor receives).
    Returns [B, H, T] float32, the mean over the query heads of a KV head.
    """
    batch, heads, tokens, _ = keys.shape
    position = torch.arange(tokens, device=keys.device)
    first = 0 if rows is None else max(0, tokens - rows)
    keys = keys[:, :, None].float()  # [B, H, 1, T, D]
    sums = keys.new_zeros(batch, heads, tokens)
    for start in range(first, tokens, BLOCK):
        stop = min(start + BLOCK, tokens)
        part = query[:, :, start:stop].float().unflatten(1, (heads, -1))  # [B, H, G, block, D]
        logits = part @ keys[:, :, :, :stop].mT * scale
        seen = (position[:stop] <= position[start:stop, None]) & valid[:, None, None, None, :stop]
        logits = logits.masked_fill(~seen, -torch.inf)
        weights = logits.softmax(-1).nan_to_num(0.0) * valid[:, None, None, start:stop, None]
        sums[:, :, :stop] += weights.sum(3).mean(2)
    return sums
