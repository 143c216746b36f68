"""Which tokens stay, and in which tier: decided once, when a token is about to be stored."""

from kvmosaic.selection.base import DROP, Budget, Selection, Step
from kvmosaic.selection.scores import AttentionSums, ExpectedAttention, Recency, Scorer, WindowAttention
from kvmosaic.selection.top import Pyramid, TopTokens

__all__ = [
    "DROP",
    "AttentionSums",
    "Budget",
    "ExpectedAttention",
    "Pyramid",
    "Recency",
    "Scorer",
    "Selection",
    "Step",
    "TopTokens",
    "WindowAttention",
]
