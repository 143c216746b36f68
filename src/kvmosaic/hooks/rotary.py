"""The rotary positions of a model: keys before their rotation, and after it, whatever form the model gives it."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from kvmosaic.errors import UnsupportedModel

GROWING = ("dynamic", "longrope")
"""Kinds of rotary scaling whose frequencies depend on the length that has been reached."""


def watch_positions(model: PreTrainedModel, note: Callable[[Tensor], None]) -> RemovableHandle | None:
    """From now on `note` is given the positions [B or 1, T, ids] of each forward pass of the text model.

    None for a model without rotary positions.
    """
    table = getattr(model.get_decoder(), "rotary_emb", None)
    ids = _ids(table)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        position = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        if ids == 1:
            note(position[..., None])
        else:  # text alone may come with one id a token
            note(position.expand(ids, *position.shape[-2:]).permute(1, 2, 0))

    return None if table is None else table.register_forward_pre_hook(before, with_kwargs=True)


def _ids(table: Any) -> int:
    """How many positions a token has: time, height and width where pictures have places."""
    return 3 if getattr(table, "mrope_section", None) else 1


class Rotary:
    """Rotates keys of the full-attention layers as the model does, from positions, and back.

    Both directions use the model's own tables and its own way of applying them (half-split or interleaved, a part of the
    channels, three ids a token), in float32, so that one undoes the other. Frozen; a copy is the same object.
    Raises UnsupportedModel, with the reason, for a model whose keys cannot be turned back.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        name, decoder = type(model).__name__, model.get_decoder()
        table = getattr(decoder, "rotary_emb", None)
        if table is None:
            raise UnsupportedModel(f"{name} has no rotary positions, so its keys are not rotated: leave pre_rope out")
        kind = table.rope_type["full_attention"] if isinstance(table.rope_type, dict) else table.rope_type
        if kind in GROWING:
            raise UnsupportedModel(
                f"{name} has {kind} rotary positions: frequencies change as the text grows, so keys that were stored "
                "before cannot be rotated as they were. Use post-RoPE keys"
            )
        self.ids = _ids(table)
        by_type = "layer_type" in inspect.signature(table.forward).parameters
        # bound methods, not the model: a cache holds this object, and the model's buffers are none of its bytes
        self._tables = functools.partial(table.forward, **({"layer_type": "full_attention"} if by_type else {}))
        self._apply = _applying(decoder, table)
        self._frequencies = functools.partial(
            getattr, table, "full_attention_inv_freq" if by_type else "inv_freq", None
        )
        self._stretch = float(
            getattr(table, "full_attention_attention_scaling" if by_type else "attention_scaling", 1.0)
        )
        self._plain: dict[tuple[int, torch.device], Tensor | None] = {}

    def __deepcopy__(self, memo: Any) -> Rotary:
        return self

    def plain(self, channels: int, device: torch.device) -> tuple[Tensor, float] | None:
        """Radians a place for each pair of channels i and i + channels / 2, [channels / 2] float32, and by what all are stretched.

        None for a model that rotates otherwise (other pairs, a part of the channels, more than one id a token).
        """
        if (channels, device) not in self._plain:
            turns, found = self._frequencies(), None
            if turns is not None and self.ids == 1 and turns.shape == (channels // 2,):
                turns = turns.to(device, torch.float32)
                x = torch.randn(1, 1, 4, channels, generator=torch.Generator().manual_seed(0)).to(device)
                place = torch.tensor([0, 1, 7, 100], device=device)
                angle = (place[:, None] * turns).tile(2)
                a, b = x.chunk(2, -1)
                ours = self._stretch * (x * angle.cos() + torch.cat([-b, a], -1) * angle.sin())
                if torch.allclose(self.rotate(x, place[None, None, :, None]), ours, atol=1e-4):
                    found = turns
            self._plain[channels, device] = found
        turns = self._plain[channels, device]
        return None if turns is None else (turns, self._stretch)

    def rotate(self, x: Tensor, position: Tensor) -> Tensor:
        """x [B, H, T, D], position [B, 1 or H, T, ids] -> float32."""
        return self._turn(x, position, 1)

    def unrotate(self, x: Tensor, position: Tensor) -> Tensor:
        """The inverse of `rotate`."""
        back = self._turn(x, position, -1)
        # scaled tables (yarn) stretch what they rotate, and so does turning back
        one = x.new_ones(1, 1, 1, x.shape[3], dtype=torch.float32)
        zero = position.new_zeros(1, 1, 1, position.shape[3])
        return back / self._turn(self._turn(one, zero, 1), zero, -1)

    def transpose(self, x: Tensor, position: Tensor) -> Tensor:
        """Takes gradients of rotated keys to those of unrotated ones: the rotation's transpose."""
        return self._turn(x, position, -1)

    def _turn(self, x: Tensor, position: Tensor, sign: int) -> Tensor:
        x, shape = x.float(), x.shape
        if position.shape[1] > 1:  # heads that hold different tokens: each is a row of its own
            x, position = x.flatten(0, 1)[:, None], position.flatten(0, 1)[:, None]
        ids = position[:, 0].long()  # [B, T, ids]
        cos, sin = self._tables(x, ids.permute(2, 0, 1) if self.ids > 1 else ids[..., 0])
        return self._apply(x, cos, sign * sin).view(shape)


def _applying(decoder: Any, table: Any) -> Any:
    """(x, cos, sin) -> x rotated: the function of the model's own file."""
    layer = next(layer for layer in decoder.layers if hasattr(layer, "self_attn"))
    own = sys.modules[type(layer.self_attn).__module__]
    if hasattr(own, "apply_multimodal_rotary_pos_emb"):  # transformers 5.17: the three tables are joined here
        apply = functools.partial(own.apply_multimodal_rotary_pos_emb, mrope_section=table.mrope_section)
    elif hasattr(own, "apply_rotary_pos_emb"):
        apply = own.apply_rotary_pos_emb
    else:
        raise UnsupportedModel(f"{own.__name__} has no function of a known name that rotates keys")
    return lambda x, cos, sin: apply(x, x, cos=cos, sin=sin)[1]
