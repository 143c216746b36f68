"""How much attention each token receives, without a matrix of tokens by tokens."""

from kvmosaic.kernels.scores.reference import column_sums

__all__ = ["column_sums"]
