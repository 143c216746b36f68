"""StreamingLLM: keep the first tokens and the newest ones.

Xiao et al., ICLR 2024, arXiv:2309.17453; code: mit-han-lab/streaming-llm.
Departures: keys stay at their true positions (the code rotates them anew by slot at each step, which is needed only
beyond the model's context).
"""

from kvmosaic.recipe import Recipe
from kvmosaic.selection import Budget, HeavyHitters, Recency, budgeted


@budgeted(tokens=516)
def streaming_llm(budget: Budget, *, sinks: int = 4) -> Recipe:
    """sinks: how many of the first tokens stay; the rest of the budget holds the newest.

    Joins with tiers whose tokens are written one by one: exact, turboquant.
    """
    return Recipe(selection=HeavyHitters(scorer=Recency(), budget=budget, sinks=sinks))
