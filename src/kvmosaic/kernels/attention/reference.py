"""Attention over a coded store in plain PyTorch: the specification of every compiled kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvmosaic.kernels.attention.dense import dense
from kvmosaic.kernels.attention.partial import Partial, merge, shares

if TYPE_CHECKING:
    from kvmosaic.codecs import Packed
    from kvmosaic.stores.lane import LaneBytes


@dataclass(frozen=True)
class Affine:
    """CalibQuant's calibration of the logits over a store: their range [least, greatest] in each query row is mapped
    to [least - low, greatest - high] (arXiv:2502.14882; the paper's tau1 and tau2).

    The released code lets the slope fall below zero where the range is narrower than high - low, which turns the order
    of the tokens round. Here the slope stays positive, unless `official`.
    """

    low: float = 0.0
    high: float = 3.0
    official: bool = False

    def apply(self, logits: Tensor, valid: Tensor) -> Tensor:
        """logits [B, H, M, S] float32, valid [B, H, 1, S] bool: invalid entries come out as they went in."""
        least = logits.masked_fill(~valid, torch.inf).amin(-1, keepdim=True)
        spread = logits.masked_fill(~valid, -torch.inf).amax(-1, keepdim=True) - least
        slope = 1 - (self.high - self.low) / (spread + 1e-8)
        if not self.official:
            slope = slope.clamp_min(1e-3)
        return torch.where(valid, least - self.low + (logits - least) * slope, logits)


def attend(
    keys: LaneBytes,
    values: LaneBytes,
    length: Tensor,
    query: Tensor,
    scale: float,
    softcap: float | None = None,
    affine: Affine | None = None,
    fresh: tuple[Tensor, Tensor] | None = None,
) -> Partial:
    """query [B, H, M, D] float32 over slots 0 ... length[b, h] - 1 of both lanes. No slot is masked otherwise.

    fresh: exact keys and values [B, H, E, D] of the step itself, attended too by every row (and not by `affine`).
    """
    stored = _stored(keys, values, length, query, scale, softcap, affine)
    if fresh is None:
        return stored
    every = torch.ones(1, 1, 1, fresh[0].shape[2], dtype=torch.bool, device=query.device)
    return merge([stored, dense(query.unsqueeze(2), *fresh, scale, every, softcap)])


def _stored(
    keys: LaneBytes,
    values: LaneBytes,
    length: Tensor,
    query: Tensor,
    scale: float,
    softcap: float | None,
    affine: Affine | None,
) -> Partial:
    slot = torch.arange(int(length.max()), device=query.device)
    logits = _valid_logits(keys, length, query, scale, softcap, affine, slot)
    lse = torch.logsumexp(logits, -1)
    weights = shares(logits, lse[..., None])
    return Partial(_mix(values, weights, slot), lse)


def mass(
    keys: LaneBytes, length: Tensor, query: Tensor, scale: float, softcap: float | None, lse: Tensor, weight: Tensor
) -> Tensor:
    """[B, H, S] float32, what each slot receives: the sum over rows of weight [B, 1, M] * exp(logit - lse [B, H, M])."""
    slot = torch.arange(int(length.max()), device=query.device)
    logits = _valid_logits(keys, length, query, scale, softcap, None, slot)
    return ((logits - lse[..., None]).exp() * weight[..., None]).sum(2)


def _valid_logits(
    keys: LaneBytes,
    length: Tensor,
    query: Tensor,
    scale: float,
    softcap: float | None,
    affine: Affine | None,
    slot: Tensor,
) -> Tensor:
    """[B, H, M, S], scaled, capped and mapped; -inf past a row's length."""
    valid = (slot < length[..., None])[:, :, None]  # [B, H, 1, S]
    logits = _logits(keys, query, slot) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if affine is not None and len(slot):
        logits = affine.apply(logits, valid)
    return logits.masked_fill(~valid, -torch.inf)


def _logits(lane: LaneBytes, query: Tensor, slot: Tensor) -> Tensor:
    """[B, H, M, S]: encoded slots by the codec, the others from the ring."""
    coded = int(lane.coded.max())
    shrunk = query if lane.basis is None else lane.basis.shrink(query)
    behind = [
        _by_run(lane, _rotating(lane, start, coded), shrunk, start, coded) for start in range(0, coded, lane.step)
    ]
    logits = torch.cat([*behind, query.new_zeros(*query.shape[:3], len(slot) - coded)], -1)
    if lane.lane.ring:
        ring = query @ lane.ring.float().mT
        exact = (slot >= lane.coded[..., None])[:, :, None]
        logits = torch.where(exact, ring.gather(3, (slot % lane.lane.ring).expand_as(logits)), logits)
    return logits


def _rotating(lane: LaneBytes, start: int, coded: int) -> Callable[[Tensor, Packed], Tensor]:
    """The codec's logits over a stride of slots; of keys encoded before their rotary positions, rotated first."""
    rotary, codec = lane.rotary, lane.lane.codec
    if rotary is None:
        return codec.logits
    position = lane.position[:, :, start : min(start + lane.step, coded)]
    return lambda query, packed: query @ rotary.rotate(codec.decode(packed), position).mT


def _mix(lane: LaneBytes, weights: Tensor, slot: Tensor) -> Tensor:
    """[B, H, M, D]: the weighted sum of the values."""
    coded = int(lane.coded.max())
    behind = weights * (slot < lane.coded[..., None])[:, :, None]
    out = weights.new_zeros(*weights.shape[:3], lane.channels)
    for start in range(0, coded, lane.step):
        out = out + _by_run(lane, lane.lane.codec.mix, behind, start, coded)
    if lane.lane.ring:
        # exact slots have an index of their own in the ring: move each weight there
        index = (slot % lane.lane.ring).expand_as(weights)
        ring = weights.new_zeros(*weights.shape[:3], lane.ring.shape[2]).scatter_add_(3, index, weights - behind)
        out = out + ring @ lane.ring.float()
    return out


def _by_run(lane: LaneBytes, product: Callable[[Tensor, Packed], Tensor], x: Tensor, start: int, coded: int) -> Tensor:
    """One of the codec's products over a stride of slots from `start`, each run of tokens with its own parts."""
    stop = min(start + lane.step, coded)
    packed, mix = lane.read(start, stop), product == lane.lane.codec.mix
    if mix:
        x = x[..., start:stop]
    if not lane.by_run or lane.starts.shape[2] == 1:
        return product(x, packed)
    slot = torch.arange(start, stop, device=x.device)
    run_of = (slot[:, None] >= lane.starts[:, :, None]).sum(-1)[:, :, None] - 1  # [B, H, 1, S]
    total = x.new_zeros(())
    for run in range(lane.starts.shape[2]):
        own = packed | {
            name: packed[name][:, :, run : run + 1] for name, part in lane.parts.items() if part.every is None
        }
        mine = run_of == run
        total = total + (product(x * mine, own) if mix else product(x, own) * mine)
    return total
