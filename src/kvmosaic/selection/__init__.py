"""Which tokens stay, and in which tier: decided once, when a token is about to be stored."""

from kvmosaic.selection.base import DROP, WAIT, Evicting, Gathering, Order, Selection, Step
from kvmosaic.selection.budget import Budget, Protect, budgeted
from kvmosaic.selection.layers import LayerBudgets, Profiled, Pyramid
from kvmosaic.selection.saliency import Saliency
from kvmosaic.selection.scores import (
    SCORERS,
    AttentionSums,
    ExpectedAttention,
    Recency,
    Reconstruction,
    Scorer,
    WindowAttention,
    scorer_of,
)
from kvmosaic.selection.top import HeavyHitters, TopTokens

__all__ = [
    "DROP",
    "SCORERS",
    "WAIT",
    "AttentionSums",
    "Budget",
    "Evicting",
    "ExpectedAttention",
    "Gathering",
    "HeavyHitters",
    "LayerBudgets",
    "Order",
    "Profiled",
    "Protect",
    "Pyramid",
    "Recency",
    "Reconstruction",
    "Saliency",
    "Scorer",
    "Selection",
    "Step",
    "TopTokens",
    "WindowAttention",
    "budgeted",
    "scorer_of",
]
