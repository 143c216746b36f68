"""Feeding a prompt again after itself, to learn which of its tokens the repetition reads (KVzip, arXiv:2505.23416)."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvmosaic.errors import UnsupportedModel
from kvmosaic.hooks import models
from kvmosaic.hooks.layer import CacheLayer

LEAD = 8
"""Tokens before each piece that are fed with it, so that its first ones find their place."""


@torch.no_grad()
def replay(model: Any, cache: Any, ids: Tensor, size: int, layers: Sequence[CacheLayer]) -> None:
    """Feed `ids` [B, T] again, `size` at a time, to a cache whose `layers` hold them and have not settled them.

    The layers note the greatest share of attention that each token receives from its own piece's repetition, and are
    otherwise as before; so are layers of other kinds. Pieces are shorter where the model's context ends.
    Raises UnsupportedModel for pictures, and ValueError if the context leaves no room.
    """
    if bool(torch.isin(ids, torch.tensor(models.visual_ids(model.config), device=ids.device)).any()):
        raise UnsupportedModel(
            "a prompt with pictures cannot be fed again from its ids, so its tokens cannot be scored this way. Use another "
            "method, e.g. snapkv"
        )
    seen, context = ids.shape[1], models.context(model.config)
    if context is not None:
        size = min(size, context - seen - LEAD)
    if size < 1:
        raise ValueError(
            f"the prompt of {seen} tokens is fed again after itself, and the model's context of {context} leaves no room. Shorten "
            "the prompt, or use a method that scores in one pass, e.g. snapkv"
        )
    waiting = layers[0].pending
    assert waiting is not None, "only a prompt that waits is fed again"
    valid = torch.ones_like(ids, dtype=torch.bool) if waiting.valid is None else waiting.valid
    decoder: nn.Module = model.get_decoder()
    name = models.cache_argument(decoder)
    whole = list(cache.layers)
    # rows are fed from their own first token, so that padding moves no border between pieces
    present = valid.sum(1, keepdim=True)
    order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)
    place = torch.where(valid, valid.cumsum(1) - 1, -1)
    for start in range(0, int(present.max()), size):
        stop = min(start + size, int(present.max()))
        for layer in layers:
            layer.replayed = (place >= start) & (place < stop)
        cache.layers = [each if isinstance(each, CacheLayer) else copy.deepcopy(each) for each in whole]
        column = torch.arange(max(0, start - LEAD), stop, device=ids.device).expand(len(ids), -1)
        arguments = {
            "input_ids": ids.gather(1, order.gather(1, column)),
            "attention_mask": torch.cat([valid, column < present], 1).long(),
            "position_ids": present + torch.arange(column.shape[1], device=ids.device),
        }
        try:
            decoder(**arguments, **{name: cache})
        finally:
            cache.layers = whole
            for layer in layers:
                layer.replayed = None
