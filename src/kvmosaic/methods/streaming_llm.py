"""StreamingLLM: keep the first tokens and the newest ones.

Xiao et al., ICLR 2024, arXiv:2309.17453; code: mit-han-lab/streaming-llm.
Departures: keys stay at their true positions (the code rotates them anew by slot at each step, which is needed only
beyond the model's context).
"""

from kvmosaic.recipe import Recipe
from kvmosaic.selection import Budget, HeavyHitters, Recency


def streaming_llm(recent: int = 512, *, sinks: int = 4) -> Recipe:
    """recent: how many of the newest tokens stay. sinks: how many of the first.

    Joins with tiers whose tokens are written one by one: exact, turboquant.
    """
    budget = Budget(tokens=sinks + recent)
    return Recipe(selection=HeavyHitters(scorer=Recency(), budget=budget, sinks=sinks))
