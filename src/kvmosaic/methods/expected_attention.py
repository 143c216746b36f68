"""Expected Attention: keep the tokens that future queries are likely to look at.

Devoto et al., 2025, arXiv:2510.00636; code: NVIDIA/kvpress.
Departures: statistics of the rotated queries of the prompt's end (see `selection.ExpectedAttention`).
"""

from kvmosaic.recipe import Recipe
from kvmosaic.selection import Budget, ExpectedAttention, TopTokens


def expected_attention(
    keep: float | None = None,
    *,
    tokens: int | None = None,
    sinks: int = 4,
    queries: int = 512,
    head_floor: float | None = None,
) -> Recipe:
    """keep: share of the prompt's tokens that stays in each KV head; or tokens: how many. 0.25 if neither is given.

    sinks: first tokens that always stay. queries: how many of the last ones stand for those to come. head_floor: heads
    compete for tokens, each keeping this share of the mean at least (AdaKV). Generated tokens all stay.
    """
    selection = TopTokens(
        scorer=ExpectedAttention(queries), budget=Budget.of(keep, tokens), sinks=sinks, head_floor=head_floor
    )
    return Recipe(selection=selection)
