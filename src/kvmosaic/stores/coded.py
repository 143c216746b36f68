"""Tokens as codes: the store behind every quantizer, and behind exact tokens too (their codec is `Exact`)."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from kvmosaic.codecs import Exact
from kvmosaic.errors import BadCalibration, NotFinite
from kvmosaic.kernels import attention
from kvmosaic.kernels.attention import Affine, Partial
from kvmosaic.projection import Basis
from kvmosaic.stores.lane import LARGEST, Even, Lane, LaneBytes

if TYPE_CHECKING:
    from kvmosaic.hooks.rotary import Rotary


class Store(Protocol):
    """The bytes of one tier in one layer, as a query reads them. How tokens come in is each store's own."""

    @property
    def length(self) -> Tensor:
        """[B, H] int64, tokens held."""
        ...

    def attend(
        self, query: Tensor, scale: float, softcap: float | None, fresh: tuple[Tensor, Tensor] | None = None
    ) -> Partial: ...

    @property
    def unverified(self) -> list[tuple[str, Tensor]]: ...

    def verify(self, fine: bool = False) -> None: ...

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]: ...

    def map(self, change: Callable[[Tensor], Tensor]) -> None: ...


class Tier(Protocol):
    """Settings of a store; frozen, shared between layers."""

    def open(
        self,
        layer: int,
        keys: Tensor,
        values: Tensor,
        basis: Basis | None = None,
        rotary: "Rotary | None" = None,
    ) -> "CodedStore":
        """Empty, for tokens like these. basis: what is encoded of keys; None = all of them. rotary: the model's rotation, for
        lanes of pre-RoPE keys."""
        ...

    def lanes(self, layer: int) -> tuple[Lane, Lane]:
        """How keys and how values are written, for arithmetic without tensors."""
        ...

    def affine_of(self, layer: int) -> Affine | None:
        """The map of its logits."""
        ...


@dataclass(frozen=True)
class Coded:
    """Keys and values as codes. `affine`: CalibQuant's map of the logits over this store before the softmax."""

    keys: Lane
    values: Lane
    affine: Affine | None = None

    def __post_init__(self) -> None:
        if self.values.pre_rope:
            raise ValueError("pre_rope is for keys: values have no rotary positions")

    def open(
        self,
        layer: int,
        keys: Tensor,
        values: Tensor,
        basis: Basis | None = None,
        rotary: "Rotary | None" = None,
    ) -> "CodedStore":
        return CodedStore(self, keys, values, basis, rotary)

    def lanes(self, layer: int) -> tuple[Lane, Lane]:
        return self.keys, self.values

    def affine_of(self, layer: int) -> Affine | None:
        return self.affine


EXACT = Coded(Lane(Exact()), Lane(Exact()))
"""The tier of tokens that are left as they are."""


@dataclass(frozen=True)
class PerLayer:
    """Another tier in each layer, as calibration or a table of sensitivities gave it."""

    tiers: tuple[Coded, ...]

    @staticmethod
    def of(tiers: Mapping[int, Coded]) -> "PerLayer":
        """By layer. Layers between that have none keep a cache of their own (sliding windows), and are never asked."""
        return PerLayer(tuple(tiers.get(layer, tiers[max(tiers)]) for layer in range(max(tiers) + 1)))

    def open(
        self,
        layer: int,
        keys: Tensor,
        values: Tensor,
        basis: Basis | None = None,
        rotary: "Rotary | None" = None,
    ) -> "CodedStore":
        return self._of(layer).open(layer, keys, values, basis, rotary)

    def lanes(self, layer: int) -> tuple[Lane, Lane]:
        return self._of(layer).lanes(layer)

    def _of(self, layer: int) -> Coded:
        if layer >= len(self.tiers):
            raise BadCalibration(f"the recipe was calibrated for {len(self.tiers)} layers, and the model has more")
        return self.tiers[layer]

    def affine_of(self, layer: int) -> Affine | None:
        return self._of(layer).affine


def answers_at_once(device: torch.device) -> bool:
    """Whether nothing has to be waited for to learn a number that lies on a device."""
    return device.type == "cpu"


class CodedStore:
    """Slots of keys and of values in two lanes; `length` [B, H] int64 counts them, row by row.

    Rows may differ in length: a token that a row does not keep (padding, another tier's) has no slot in it.
    """

    def __init__(
        self,
        tier: Coded,
        keys: Tensor,
        values: Tensor,
        basis: Basis | None = None,
        rotary: "Rotary | None" = None,
    ) -> None:
        self.tier = tier
        self.keys = LaneBytes(tier.keys, "keys", keys, basis, rotary)
        self.values = LaneBytes(tier.values, "values", values)
        self.length = torch.zeros(keys.shape[:2], dtype=torch.int64, device=keys.device)
        self._even = Even(self.length, 0)
        self.unverified: list[
            tuple[str, Tensor]
        ] = []  # role and [] bool, on a device that has not been asked yet: is it finite

    def put(self, keys: Tensor, values: Tensor, keep: Tensor | None, position: Tensor | None = None) -> None:
        """Append tokens. keys, values [B, H, T, D]; keep [B, H, T] bool, None = all; position [B, T, ids] if keys are to be
        encoded without.

        Raises NotFinite before anything is written; on a GPU, which would have to be waited for, `verify` does later.
        """
        self.verify()  # nobody may have asked since
        count, place = None, None if position is None else position[:, None]
        if keep is not None:
            count = keep.sum(2)
            most = int(count.max())
            if not most:
                return
            # kept tokens first, in order: a stable sort of "not kept"
            order = (~keep).to(torch.uint8).argsort(dim=2, stable=True)[:, :, :most, None]
            keys = keys.gather(2, order.expand(-1, -1, -1, keys.shape[3]))
            values = values.gather(2, order.expand(-1, -1, -1, values.shape[3]))
            if place is not None:
                heads = 1 if bool((keep == keep[:, :1]).all()) else keep.shape[1]
                order = order[:, :heads].expand(-1, -1, -1, place.shape[3])
                place = place.expand(-1, heads, -1, -1).gather(2, order)
        self.examine(keys, values)
        even = None if count is not None else self._even.of(self.length)
        self.keys.put(keys, count, self.length, place, even)
        self.values.put(values, count, self.length, None, even)
        self.length = self.length + (keys.shape[2] if count is None else count)
        if even is not None:
            self._even = Even(self.length, even + keys.shape[2])

    def examine(self, keys: Tensor, values: Tensor) -> None:
        """Raises NotFinite if these cannot be encoded; on a GPU `verify` does."""
        for lane, x in ((self.keys, keys), (self.values, values)):
            if (finite := lane.finite(x)) is not None:
                self.unverified.append((lane.role, finite))
        if answers_at_once(keys.device):
            self.verify()

    def verify(self, fine: bool = False) -> None:
        """Raises NotFinite if what has been put since the last time cannot be encoded. fine: somebody has looked, and it can."""
        unverified, self.unverified = self.unverified, []
        for role, finite in unverified:
            if not fine and not bool(finite):
                raise NotFinite(
                    f"the {role} to encode hold NaN, infinity or numbers beyond {LARGEST:.0f} (half of float16). Check the model's "
                    "weights and dtype, or keep this layer exact"
                )

    def shorten(self, length: Tensor) -> None:
        """Forget the slots from `length` [B, H] on; only where both lanes encode every token at once."""
        self.length = length
        self.keys.coded = self.values.coded = length

    def needs(self, tokens: int) -> int:
        """Slots for `tokens` more in every row."""
        return int(self.length.max()) + tokens

    def pin(self, slots: int, runs: int = 0) -> None:
        """Room for `slots` and for `runs` more runs, in tensors that a captured step reads and writes in place."""
        self.keys.pin(slots, runs)
        self.values.pin(slots, runs)
        self.length = self.length.clone()

    def unpin(self) -> None:
        """Back to tensors that `put` may replace."""
        self.keys.unpin()
        self.values.unpin()

    def put_pinned(self, keys: Tensor, values: Tensor, keep: Tensor) -> None:
        """`put` as one more run while pinned, for lanes that hold nothing back: nothing waits for the device."""
        count, order = keep.sum(2), (~keep).to(torch.uint8).argsort(dim=2, stable=True)[..., None]
        for lane, x in ((self.keys, keys), (self.values, values)):
            lane.put_pinned(x.gather(2, order.expand_as(x)), count)
        self.length += count

    @property
    def room(self) -> int:
        """Slots that both sides have room for."""
        return min(self.keys.room, self.values.room)

    @property
    def runs_left(self) -> float:
        """Runs that there is room for; no end of them where tokens share nothing by run."""
        return min(
            (lane.starts.shape[2] - lane.runs for lane in (self.keys, self.values) if lane.by_run), default=math.inf
        )

    def load(self, other: "CodedStore") -> bool:
        """Take over another store's tokens into the tensors that are here; False if they have no room for them."""
        if not (self.keys.load(other.keys) and self.values.load(other.values)):
            return False
        self.length.copy_(other.length)
        return True

    def attend(
        self, query: Tensor, scale: float, softcap: float | None, fresh: tuple[Tensor, Tensor] | None = None
    ) -> Partial:
        """query [B, H, M, D] (the M rows of a KV head: its query heads times the step's tokens) over every slot.

        fresh: keys and values [B, H, E, D] of the step itself, to be attended in the same pass.
        """
        return attention.attend(self.keys, self.values, self.length, query, scale, softcap, self.tier.affine, fresh)

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        for side, lane in (("keys", self.keys), ("values", self.values)):
            for name, kind, tensor in lane.tensors():
                yield f"{side}.{name}", kind, tensor
        yield "length", "metadata", self.length

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.keys.map(change)
        self.values.map(change)
        self.length = change(self.length)
