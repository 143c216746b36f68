"""H2O: keep the tokens that have received most attention, and the newest ones; one leaves as each new one comes.

Zhang et al., NeurIPS 2023, arXiv:2306.14048; code: FMInference/H2O, of whose three code paths we follow the one that
really drops tokens (`utils_real_drop`), with keys at their true positions.
Departures: scores are summed in float32; under GQA one decision serves the query heads that share a key head, by their
mean; rows of a batch have budgets of their own, and padding no score; later turns are scored by all their queries and
then evicted from together.
"""

from kvmosaic.recipe import Recipe
from kvmosaic.selection import AttentionSums, Budget, HeavyHitters, budgeted


@budgeted(keep=0.2)
def h2o(budget: Budget, *, recent: int = 32) -> Recipe:
    """recent: how many of the newest always stay, within the budget (the paper: half of it).

    The first prompt sets how many tokens each KV head may hold from then on. Joins with tiers whose tokens are written one
    by one: exact, turboquant.
    """
    return Recipe(selection=HeavyHitters(scorer=AttentionSums(), budget=budget, recent=recent))
