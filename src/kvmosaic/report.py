"""What a cache costs and what it saves, in bytes that are really held."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmosaic.hooks.cache import Cache

KINDS = ("codes", "scales", "exact", "metadata", "learned")


@dataclass(frozen=True)
class Report:
    """Bytes resident, by what they hold, over all layers, and what an exact cache would hold for the same tokens.

    `exact_cache` is transformers' DynamicCache: every column of the batch, padding included, in the model's dtype.
    `learned` is what calibration found and the codes are read with: the same for every sequence and cache of a model.
    """

    codes: int
    scales: int
    exact: int
    metadata: int
    learned: int
    exact_cache: int
    tokens: int

    @staticmethod
    def of(cache: Cache) -> Report:
        kinds = dict.fromkeys(KINDS, 0)
        counted = set()
        for _, kind, tensor in cache.tensors():
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in counted:  # tensors that share memory count once, and with all of it
                counted.add(storage.data_ptr())
                kinds[kind] += storage.nbytes()
        dense = 0
        for layer in cache.layers:
            if hasattr(layer, "stores"):
                if layer.is_initialized:
                    dense += (
                        layer.seen * layer.batch_size * layer.num_heads * sum(layer.head_sizes) * layer.dtype.itemsize
                    )
            else:
                dense += sum(t.nbytes for t in (layer.keys, layer.values) if t is not None)
        return Report(**kinds, exact_cache=dense, tokens=cache.get_seq_length())

    @property
    def total(self) -> int:
        return self.codes + self.scales + self.exact + self.metadata + self.learned

    @property
    def compression(self) -> float:
        """Exact bytes over resident bytes: 4.0 = four times smaller."""
        return self.exact_cache / self.total if self.total else 1.0

    def row(self) -> dict[str, Any]:
        """For tables and JSON: sizes in bytes."""
        return asdict(self) | {"total": self.total, "compression": self.compression}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size(getattr(self, name))}" for name in KINDS if name != "learned" or self.learned)
        exact = f"compression {self.compression:.2f}x, exact would be {size(self.exact_cache)}"
        return f"{size(self.total)} for {self.tokens} tokens ({parts}); {exact}"


def size(nbytes: float) -> str:
    """1536 -> '1.5 KiB'."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min((max(int(nbytes), 1).bit_length() - 1) // 10, len(units) - 1)
    return f"{nbytes / 1024**power:.{1 if power else 0}f} {units[power]}"
