"""ThinK: store only the key channels that the prompt's last queries look at.

Xu et al., ICLR 2025, arXiv:2407.21018; code: SalesforceAIResearch/ThinK.
Departures: one choice per KV head, by all its query heads (the code stores every query head's own keys); generated keys
are pruned like the prompt's when they leave the window, with and without a quantizer (the code without: they stay
whole). The first prompt chooses, however short it is, and later prompts follow its choice.
"""

from kvmosaic.projection import QueryDriven
from kvmosaic.recipe import Recipe

PRUNED = 0.4


def think(pruned: float | None = None, *, channels: int | None = None, queries: int = 32, recent: int = 32) -> Recipe:
    """pruned: share of the key channels that is not stored; or channels: how many are. 0.4 pruned if neither is given.

    queries: how many of the first prompt's last queries choose. recent: how many of the newest keys stay whole, unless
        another recipe joined says what is exact (`think | kivi residual=64`). Codes are packed 32 channels at a time: with a
        quantizer counts that are multiples of 32 waste nothing.
    """
    if pruned is None and channels is None:
        pruned = PRUNED
    return Recipe(projection=QueryDriven(pruned=pruned, channels=channels, queries=queries, recent=recent))
