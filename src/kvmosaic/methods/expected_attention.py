"""Expected Attention: keep the tokens that future queries are likely to look at.

Devoto et al., 2025, arXiv:2510.00636; code: NVIDIA/kvpress.
Departures: the newest tokens stay (the code compresses a context once, before its question; here a question is a later turn,
which would else lose most of itself); one decision per KV head. Pictures' places: see `selection.ExpectedAttention`.
"""

from kvmosaic.recipe import Recipe
from kvmosaic.selection import Budget, ExpectedAttention, TopTokens, budgeted


@budgeted(keep=0.25)
def expected_attention(
    budget: Budget, *, sinks: int = 4, recent: int = 32, future: int = 512, epsilon: float = 0.01
) -> Recipe:
    """sinks: first tokens that always stay. recent: the newest ones, which do, too.

    future: over how many coming places queries are averaged. epsilon: added to a token's expected attention before it is
    weighted by the length of its value (the code's class has 0, its published results 0.01).
    Generated tokens all stay. With heads that compete: adakv scorer=expected_attention.
    """
    scorer = ExpectedAttention(future, epsilon)
    return Recipe(selection=TopTokens(scorer=scorer, budget=budget, sinks=sinks, recent=recent))
