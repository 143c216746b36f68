"""Dense stand-ins for compressed caches, written from the papers' words alone and run on untouched models.

A layer keeps every token as it came, and hands attention a dense copy in which the settled tokens are quantized and
dequantized. A token is settled when the step that brought it is over; while past is recorded, when `crop` accepts it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def quantize(x: Tensor, dim: int, bits: int) -> Tensor:
    """One range along `dim`, with float16 parameters; codes fitted to them."""
    low = x.amin(dim, keepdim=True).half().float()
    scale = ((x.amax(dim, keepdim=True) - low) / (2**bits - 1)).half().float()
    code = ((x - low) / torch.where(scale > 0, scale, 1)).round().clamp(0, 2**bits - 1)
    return low + scale * code


class Layer(DynamicLayer):
    """`lossy(keys, values, settled)` gives what the first `settled` tokens and the rest look like to attention."""

    def __init__(self, lossy: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.lossy, self.settled, self.record_past = lossy, 0, False

    def activate_past_recording(self) -> None:
        self.record_past = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)
        seen = self.lossy(keys, values, self.settled)
        if not self.record_past:
            self.settled = keys.shape[2]
        return seen

    def crop(self, tokens_to_remove: int) -> None:
        stop = self.keys.shape[2] + tokens_to_remove
        self.keys, self.values, self.settled = self.keys[:, :, :stop], self.values[:, :, :stop], stop


def kivi(bits: int, group: int = 32, residual: int = 128) -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    """Keys per channel over groups of tokens, all but the last T mod R; values per token, all but the last R."""

    def lossy(keys: Tensor, values: Tensor, settled: int) -> tuple[Tensor, Tensor]:
        k, v = settled // residual * residual, max(0, settled - residual)
        old_keys = quantize(keys[:, :, :k].float().unflatten(2, (-1, group)), 3, bits).flatten(2, 3)
        old_values = quantize(values[:, :, :v].float().unflatten(3, (-1, group)), 4, bits).flatten(3, 4)
        return torch.cat([old_keys, keys[:, :, k:]], 2), torch.cat([old_values, values[:, :, v:]], 2)

    return lossy


def calibquant(bits: int, visual: Tensor) -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    """One range per channel over the visual tokens [T] of the prompt, unclipped, logits not calibrated; text exact."""

    def lossy(keys: Tensor, values: Tensor, settled: int) -> tuple[Tensor, Tensor]:
        def write(x: Tensor) -> Tensor:
            x = x.clone()
            x[:, :, : len(visual)][:, :, visual] = quantize(x[:, :, : len(visual)][:, :, visual].float(), 2, bits)
            return x

        return (write(keys), write(values)) if settled else (keys, values)

    return lossy


def cache(model: nn.Module, lossy: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]) -> DynamicCache:
    """Of a model whose config makes this cache: full-attention layers are lossy, sliding ones as they are."""
    made = DynamicCache(config=model.config.get_text_config(decoder=True))
    made.layers = [Layer(lossy) if type(layer) is DynamicLayer else layer for layer in made.layers]
    return made
