"""Which numbers of a key are stored: decided once, from the first prompt, for each row and KV head."""

from kvmosaic.projection.base import NO_KERNEL, Basis, Projection
from kvmosaic.projection.channels import Channels, LargestFirst, QueryDriven

__all__ = ["NO_KERNEL", "Basis", "Channels", "LargestFirst", "Projection", "QueryDriven"]
