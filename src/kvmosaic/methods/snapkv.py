"""SnapKV: after the prompt, keep the tokens that its last queries look at.

Li et al., NeurIPS 2024, arXiv:2404.14469; code: FasterDecoding/SnapKV.
Departures: one decision per KV head, by the mean over its query heads (the code stores every query head's own keys);
prompts that come in chunks or turns are selected from one by one.
"""

from kvmosaic.recipe import Recipe
from kvmosaic.selection import Budget, TopTokens, WindowAttention, budgeted


@budgeted(keep=0.25)
def snapkv(budget: Budget, *, window: int = 32, kernel: int = 7, pooling: str = "max") -> Recipe:
    """window: how many of the last queries score the others, and themselves stay.
    kernel, pooling: of the scores over neighbouring tokens.

    Generated tokens all stay.
    """
    return Recipe(selection=TopTokens(scorer=WindowAttention(window, kernel, pooling), budget=budget, recent=window))
