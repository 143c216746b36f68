"""Attention of a step's queries over one coded store, and over the step's own exact tokens."""

from kvmosaic.kernels.attention.dense import dense
from kvmosaic.kernels.attention.partial import Partial, merge
from kvmosaic.kernels.attention.reference import Affine, attend

__all__ = ["Affine", "Partial", "attend", "dense", "merge"]
