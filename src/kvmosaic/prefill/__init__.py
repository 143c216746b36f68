"""How the attention of a prompt is computed, where a method changes that."""

from kvmosaic.prefill.important import AmongImportant, Prefill

__all__ = ["AmongImportant", "Prefill"]
