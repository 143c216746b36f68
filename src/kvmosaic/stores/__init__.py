"""Where encoded tokens lie, and how a query reads them."""

from kvmosaic.stores.coded import Coded, CodedStore, PerLayer, Store, Tier
from kvmosaic.stores.lane import Lane, LaneBytes

__all__ = ["Coded", "CodedStore", "Lane", "LaneBytes", "PerLayer", "Store", "Tier"]
