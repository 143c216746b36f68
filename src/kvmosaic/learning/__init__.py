"""What calibrated methods learn from: one layer's keys and values on some text, and how to find levels among them."""

from kvmosaic.learning.kmeans import kmeans, levels
from kvmosaic.learning.sample import Sample, Side

__all__ = ["Sample", "Side", "kmeans", "levels"]
