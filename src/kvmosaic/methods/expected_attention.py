"""Expected Attention: keep the tokens that future queries are likely to look at.

Devoto et al., 2025, arXiv:2510.00636; code: NVIDIA/kvpress.
Departures: statistics of the rotated queries of the prompt's end (see `selection.ExpectedAttention`).
"""

from kvmosaic.recipe import Recipe
from kvmosaic.selection import Budget, ExpectedAttention, TopTokens, budgeted


@budgeted(keep=0.25)
def expected_attention(budget: Budget, *, sinks: int = 4, queries: int = 512) -> Recipe:
    """sinks: first tokens that always stay. queries: how many of the last ones stand for those to come.

    Generated tokens all stay. With heads that compete: adakv scorer=expected_attention.
    """
    return Recipe(selection=TopTokens(scorer=ExpectedAttention(queries), budget=budget, sinks=sinks))
