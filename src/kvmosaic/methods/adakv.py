"""AdaKV: the heads of a layer compete for its tokens, each with a floor; around any scorer.

Feng et al., 2024, arXiv:2407.11550; code: FFY0/AdaKV.
Departures: one decision per KV head (the code: per query head); the floor holds what must stay anyway. Each head is stored
as long as its own tokens, but in captured steps, which give all heads of a layer the room of its greediest.
"""

from kvmosaic.recipe import Recipe
from kvmosaic.selection import Budget, TopTokens, WindowAttention, budgeted, scorer_of


@budgeted(keep=0.25)
def adakv(
    budget: Budget,
    *,
    floor: float = 0.2,
    scorer: str = "snapkv",
    window: int = 32,
    kernel: int = 7,
    pooling: str = "max",
) -> Recipe:
    """floor: share of the mean budget that every head keeps; 1 = no contest (the paper's alpha).

    scorer: what scores tokens: snapkv, snapkv_mean, h2o or expected_attention.
    window: how many of the newest tokens stay; snapkv's queries are those.
    kernel, pooling: of snapkv's scores over neighbouring tokens.

    Generated tokens all stay.
    """
    chosen = WindowAttention(window, kernel, pooling) if scorer == "snapkv" else scorer_of(scorer)
    return Recipe(selection=TopTokens(scorer=chosen, budget=budget, recent=window, head_floor=floor))
