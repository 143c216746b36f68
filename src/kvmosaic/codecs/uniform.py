"""Uniform quantization with separable scales: the codes are integers, and attention reads them as integers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kvmosaic.codecs.base import Codec, Packed, Part

BITS = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Uniform(Codec):
    """x is about low + scale * code, with one (low, scale) in float16 per group of numbers along `axis`.

    bits: 1, 2, 4 or 8.
    axis: "channel": a group is one channel over `group` tokens (None: over all the tokens encoded together);
        "token": a group is `group` neighbouring channels of one token (None: all channels).
    clip: the range is shrunk to this share before quantizing; a float, or one per KV head. Numbers outside saturate.
    clip_about: "zero" shrinks the two ends towards zero (CalibQuant's released code), "center" towards the middle.
    equalize: token axis only: first divide each channel by sqrt(max |x|) over the run (ZipCache's channel-separable
        scheme); the factor is stored once a run.
    Bits per number: bits + 32/group. Error: at most scale/2 for numbers inside the range, plus the float16 rounding of
    `low`. A group of equal numbers is exact (to that rounding); an empty run gives empty parts.
    Raises ValueError for bits that do not fill a byte, and if `group` does not divide the grouped length.
    Sources: KIVI arXiv:2402.02750 (both axes); CalibQuant arXiv:2502.14882 (channel axis over a run, clip, and the
    algebra of `logits` and `mix`: scales move to the query and to the output); ZipCache arXiv:2405.14256 (equalize).
    """

    bits: int
    axis: Literal["channel", "token"]
    group: int | None = None
    clip: float | tuple[float, ...] = 1.0
    clip_about: Literal["zero", "center"] = "zero"
    equalize: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits must be 1, 2, 4 or 8 (codes fill a byte), got {self.bits}")
        if self.axis not in ("channel", "token"):
            raise ValueError(f"axis must be 'channel' or 'token', got {self.axis!r}")
        if self.group is not None and self.group < 1:
            raise ValueError(f"group must be at least 1, got {self.group}")
        if self.clip_about not in ("zero", "center"):
            raise ValueError(f"clip_about must be 'zero' or 'center', got {self.clip_about!r}")
        if not all(0 < clip <= 1 for clip in ((self.clip,) if isinstance(self.clip, float | int) else self.clip)):
            raise ValueError(f"clip is a share of the range, above 0 and at most 1, got {self.clip}")
        if self.equalize and self.axis != "token":
            raise ValueError("equalize divides out the channels before per-token ranges: it needs axis='token'")

    @property
    def unit(self) -> int:
        return self.group if self.axis == "channel" and self.group else 1

    def of_head(self, head: int) -> Codec:
        return self if isinstance(self.clip, float | int) else replace(self, clip=self.clip[head])

    def parts(self, channels: int) -> Mapping[str, Part]:
        parts = {"codes": Part(every=1, width=channels, dtype=torch.uint8, bits=self.bits, kind="codes")}
        if self.axis == "channel":
            shape = {"every": self.group, "width": channels}
        else:
            group = self.group or channels
            if channels % group:
                raise ValueError(f"group must divide the head size {channels}, got {group}")
            shape = {"every": 1, "width": channels // group}
        parts["scale"] = parts["low"] = Part(**shape, dtype=torch.float16, bits=16, kind="scales")  # type: ignore[arg-type]
        if self.equalize:
            parts["channel"] = Part(every=None, width=channels, dtype=torch.float16, bits=16, kind="scales")
        return parts

    def encode(self, x: Tensor, valid: Tensor | None) -> Packed:
        x = x.float()
        packed = {}
        if self.equalize:
            seen = x if valid is None else x.masked_fill(~valid[..., None], 0)
            seen = torch.nn.functional.pad(seen, (0, 0, 0, 1))  # a maximum over no tokens is 0
            channel = seen.abs().amax(2, keepdim=True).sqrt()
            packed["channel"] = channel = torch.where(channel > 0, channel, 1.0).to(torch.float16)
            x = x / channel.float()
        grouped, dim = self._grouped(x)
        ends = [grouped, grouped]
        if valid is not None and self.axis == "channel":
            out = ~self._grouped(valid[..., None])[0]
            ends = [grouped.masked_fill(out, torch.inf), grouped.masked_fill(out, -torch.inf)]
        low, high = ends[0].amin(dim, keepdim=True), ends[1].amax(dim, keepdim=True)
        if valid is not None and self.axis == "channel":  # a row without tokens has no range
            low, high = low.masked_fill(low == torch.inf, 0), high.masked_fill(high == -torch.inf, 0)
        low, scale = self.fit(low, high)
        step = torch.where(scale > 0, scale.float(), 1.0)  # constant groups: code 0, no division by zero
        codes = ((grouped - low.float()) / step).round().clamp(0, 2**self.bits - 1)
        codes = torch.where(scale > 0, codes, 0).to(torch.uint8).view(x.shape)
        return packed | {"codes": codes, "scale": scale.squeeze(dim), "low": low.squeeze(dim)}

    def decode(self, packed: Packed) -> Tensor:
        codes, dim = self._grouped(packed["codes"].float())
        scale, low = packed["scale"].float().unsqueeze(dim), packed["low"].float().unsqueeze(dim)
        x = (low + scale * codes).view(packed["codes"].shape)
        return x * packed["channel"].float() if self.equalize else x

    def logits(self, query: Tensor, packed: Packed) -> Tensor:
        if self.equalize:
            query = query * packed["channel"].float()
        codes, scale, low = packed["codes"].float(), packed["scale"].float(), packed["low"].float()
        if self.axis == "channel":  # q . (low + s * c) = (q * s) . c + q . low, once a token group
            groups = codes.unflatten(2, (scale.shape[2], -1))  # [B, H, E, group, D]
            scaled = query[:, :, None] * scale.unsqueeze(3)  # [B, H, E, M, D]
            offset = query @ low.mT  # [B, H, M, E]
            return (scaled @ groups.mT).transpose(2, 3).add(offset.unsqueeze(-1)).flatten(3)
        count = scale.shape[-1]  # channel groups: each has its own token scale
        pieces = torch.einsum("bhmgd,bhtgd->bhmgt", query.unflatten(-1, (count, -1)), codes.unflatten(-1, (count, -1)))
        sums = query.unflatten(-1, (count, -1)).sum(-1)  # [B, H, M, groups]
        return (pieces * scale.mT.unsqueeze(2)).sum(3) + sums @ low.mT

    def mix(self, weights: Tensor, packed: Packed) -> Tensor:
        codes, scale, low = packed["codes"].float(), packed["scale"].float(), packed["low"].float()
        if self.axis == "channel":  # sum p (low + s * c) = s * (p . c) + low * sum p, once a token group
            grouped = weights.unflatten(-1, (scale.shape[2], -1)).transpose(2, 3)  # [B, H, E, M, group]
            out = (grouped @ codes.unflatten(2, (scale.shape[2], -1))) * scale.unsqueeze(3)
            return out.sum(2) + grouped.sum(-1).mT @ low
        count = scale.shape[-1]
        scaled = weights.unsqueeze(3) * scale.mT.unsqueeze(2)  # [B, H, M, groups, tokens]
        out = torch.einsum("bhmgt,bhtgd->bhmgd", scaled, codes.unflatten(-1, (count, -1)))
        out = (out + (weights @ low).unsqueeze(-1)).flatten(3)
        return out * packed["channel"].float() if self.equalize else out

    def fit(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Ranges of groups, [B, H, ...] float32 -> (low, scale) as stored, float16."""
        low, high = self._clip(low, high)
        # codes are fitted to the parameters as stored, so their rounding is not an error on top
        low = low.to(torch.float16)
        return low, ((high - low.float()) / (2**self.bits - 1)).clamp_min(0).to(torch.float16)

    def _grouped(self, x: Tensor) -> tuple[Tensor, int]:
        """x with the numbers that share a range along a dimension of their own, and which one it is."""
        if self.axis == "channel":
            tokens = x.shape[2]
            group = self.group or max(tokens, 1)
            if tokens % group:
                raise ValueError(f"group must divide the number of tokens {tokens}, got {group}")
            return x.unflatten(2, (tokens // group, group)), 3
        return x.unflatten(3, (-1, self.group or x.shape[3])), 4

    def _clip(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if self.clip == 1.0:
            return low, high
        clip = torch.tensor(self.clip, device=low.device).view(-1, *[1] * (low.dim() - 2))  # one value, or one a head
        if self.clip_about == "zero":
            return low * clip, high * clip
        middle, half = (low + high) / 2, (high - low) / 2
        return middle - clip * half, middle + clip * half
