"""PyramidKV: SnapKV with more tokens in lower layers, in even steps.

Cai et al., 2024, arXiv:2406.02069; code: Zefan-Cai/KVCache-Factory.
Departures: shares instead of counts by layer, so that their mean is the budget (the code's integer steps overshoot small
ones by up to 5 %); one decision per KV head, as in our snapkv.
"""

from kvmosaic.recipe import Recipe
from kvmosaic.selection import Budget, Pyramid, TopTokens, WindowAttention, budgeted


@budgeted(keep=0.25)
def pyramidkv(budget: Budget, *, beta: float = 20.0, window: int = 8, kernel: int = 7, pooling: str = "max") -> Recipe:
    """beta: the mean budget over that of the top layer.
    window: how many of the last queries score the others, and themselves stay.
    kernel, pooling: of the scores over neighbouring tokens.

    Generated tokens all stay.
    """
    scorer = WindowAttention(window, kernel, pooling)
    return Recipe(selection=TopTokens(scorer=scorer, budget=budget, recent=window, layers=Pyramid(beta)))
