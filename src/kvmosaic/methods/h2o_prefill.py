"""H2O at the prompt only: keep the tokens that have received most attention, and the newest ones.

Zhang et al., NeurIPS 2023, arXiv:2306.14048. This is the variant of most published tables (Zefan-Cai/KVCache-Factory):
one selection after the prompt. The authors' own code also evicts a token at every generated one.
Departures: scores are summed in float32; under GQA one decision serves the query heads that share a key head.
"""

from kvmosaic.recipe import Recipe
from kvmosaic.selection import AttentionSums, Budget, TopTokens, budgeted


@budgeted(keep=0.25)
def h2o_prefill(budget: Budget, *, recent: int = 32, normalize: bool = False) -> Recipe:
    """recent: how many of the newest always stay, within the budget.
    normalize: divide a token's attention by the number of queries that could see it (early tokens lose their advantage).

    Generated tokens all stay.
    """
    return Recipe(selection=TopTokens(scorer=AttentionSums(normalize), budget=budget, recent=recent))
