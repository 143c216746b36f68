"""Where encoded tokens lie, and how a query reads them."""

from kvmosaic.stores.coded import EXACT, Coded, CodedStore, PerLayer, Store, Tier
from kvmosaic.stores.evicting import EvictingStore
from kvmosaic.stores.lane import Lane, LaneBytes
from kvmosaic.stores.ragged import RaggedStore

__all__ = [
    "EXACT",
    "Coded",
    "CodedStore",
    "EvictingStore",
    "Lane",
    "LaneBytes",
    "PerLayer",
    "RaggedStore",
    "Store",
    "Tier",
]
