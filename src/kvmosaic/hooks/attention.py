"""The attention function that transformers calls, registered as "kvmosaic" together with its mask function.

A compressed layer hands a `Handle` where attention expects keys and values, so that no dense copy is ever built.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvmosaic.errors import CacheMismatch
from kvmosaic.kernels.attention import Partial, dense, merge

NAME = "kvmosaic"


class Handle:
    """The keys (and the values) of one step in one layer, on their way from `Cache.update` to the attention function."""

    __slots__ = ("keys", "layer", "values")

    def __init__(self, layer: Any, keys: Tensor, values: Tensor) -> None:
        self.layer, self.keys, self.values = layer, keys, values

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python and torch.compile ask for such names of any object
            raise AttributeError(name)
        raise CacheMismatch(
            f"a compressed cache met an attention function that reads dense keys (it asked for .{name}). The cache was "
            "made for another model, or the model's attention was set again: use kvmosaic.Cache(model, recipe) with "
            "the model that generates"
        )


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Handle,
    value: Tensor | Handle,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [B, Hq, T, D] -> ([B, T, Hq, D], None). `softcap`: Gemma2's cap on the logits; `s_aux`: learned sinks."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, Handle):
        if kwargs.get("position_bias") is not None:
            raise CacheMismatch("a learned position bias cannot be added to stored tokens; use the exact cache")
        return key.layer.attend(module, query, key, attention_mask, scale, softcap, s_aux), None
    # sliding layers, vision towers, other caches, training
    assert isinstance(value, Tensor), "keys and values arrive alike"
    return exact(module, query, key, value, attention_mask, scale, softcap, s_aux, dropout, **kwargs), None


def exact(
    module: nn.Module,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> Tensor:
    """Attention over dense keys and values: transformers' own, unless the model caps logits or has sinks."""
    if softcap is None and sinks is None:
        out, _ = sdpa_attention_forward(module, query, keys, values, mask, dropout=dropout, scaling=scale, **kwargs)
        return out
    causal = kwargs.get("is_causal")
    if mask is None and not (getattr(module, "is_causal", True) if causal is None else causal):
        mask = torch.ones(1, 1, query.shape[2], keys.shape[2], dtype=torch.bool, device=query.device)
    part = dense(by_kv_head(query, keys.shape[1]), keys, values, scale, mask, softcap)
    return to_output(with_sinks([part], sinks), query)


def with_sinks(partials: list[Partial], sinks: Tensor | None) -> Partial:
    """Merge, with each query head's sink logit [Hq] in the denominator (gpt-oss)."""
    if sinks is not None:
        first = partials[0]
        batch, heads, rows = first.lse.shape
        steps = rows * heads // sinks.numel()
        lse = sinks.float().view(1, heads, -1, 1).expand(batch, -1, -1, steps).reshape(batch, heads, rows)
        partials = [*partials, Partial(torch.zeros_like(first.out), lse)]
    return merge(partials)


def by_kv_head(query: Tensor, heads: int) -> Tensor:
    """[B, Hq, T, D] -> [B, H, G, T, D]: the query heads that share a KV head side by side."""
    return query.unflatten(1, (heads, -1))


def to_output(part: Partial, query: Tensor) -> Tensor:
    """[B, H, G * T, D] float32 -> [B, T, Hq, D] in the query's dtype."""
    batch, query_heads, steps, _ = query.shape
    return part.out.view(batch, query_heads, steps, -1).transpose(1, 2).to(query.dtype).contiguous()


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # without it every mask silently becomes None
