"""KVzip: after the prompt, keep the tokens that its own repetition looks at.

Kim et al., NeurIPS 2025, arXiv:2505.23416; code: snu-mllab/KVzip.
Departures: the prompt follows itself without an instruction (a cache has no tokenizer), each piece after its last eight
tokens; shares are those of the attention over the whole prompt and the repetition, not over the piece alone. Costs another
pass over the prompt. Text only.
"""

from kvmosaic.recipe import Recipe
from kvmosaic.selection import Budget, Reconstruction, TopTokens, budgeted


@budgeted(keep=0.25)
def kvzip(budget: Budget, *, sinks: int = 4, replay: int = 2000, floor: float = 0.0) -> Recipe:
    """sinks: first tokens that always stay.

    replay: how many tokens are fed again at a time.
    floor: the heads of all layers compete for tokens, each keeping this share of the mean at least; 1 = no contest.
    Later turns and generated tokens all stay.
    """
    selection = TopTokens(scorer=Reconstruction(replay), budget=budget, sinks=sinks, head_floor=floor)
    return Recipe(selection=selection)
