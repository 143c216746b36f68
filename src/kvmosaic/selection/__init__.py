"""Which tokens stay, and in which tier: decided once, when a token is about to be stored."""

from kvmosaic.selection.base import DROP, WAIT, Budget, Evicting, Gathering, Selection, Step
from kvmosaic.selection.layers import LayerBudgets, Profiled, Pyramid
from kvmosaic.selection.saliency import Saliency
from kvmosaic.selection.scores import AttentionSums, ExpectedAttention, Recency, Scorer, WindowAttention
from kvmosaic.selection.top import HeavyHitters, TopTokens

__all__ = [
    "DROP",
    "WAIT",
    "AttentionSums",
    "Budget",
    "Evicting",
    "ExpectedAttention",
    "Gathering",
    "HeavyHitters",
    "LayerBudgets",
    "Profiled",
    "Pyramid",
    "Recency",
    "Saliency",
    "Scorer",
    "Selection",
    "Step",
    "TopTokens",
    "WindowAttention",
]
