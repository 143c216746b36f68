"""AdaKV: the heads of a layer compete for its tokens, each with a floor; around any scorer.

Feng et al., 2024, arXiv:2407.11550; code: FFY0/AdaKV.
Departures: one decision per KV head (the code: per query head); the floor holds what must stay anyway. Heads lie side by
side in blocks as long as the longest, so that a layer's bytes follow its greediest head (`compression` counts them).
"""

from kvmosaic.recipe import Recipe
from kvmosaic.selection import Budget, TopTokens, budgeted, scorer_of


@budgeted(keep=0.25)
def adakv(budget: Budget, *, floor: float = 0.2, scorer: str = "snapkv", recent: int = 32) -> Recipe:
    """floor: share of the mean budget that every head keeps; 1 = no contest (the paper's alpha).

    scorer: what scores tokens: snapkv, snapkv_mean, h2o or expected_attention.
    recent: the newest tokens, which always stay.

    Generated tokens all stay.
    """
    selection = TopTokens(scorer=scorer_of(scorer), budget=budget, recent=recent, head_floor=floor)
    return Recipe(selection=selection)
