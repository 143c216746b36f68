"""SnapKV: after the prompt, keep the tokens that its last queries look at.

Li et al., NeurIPS 2024, arXiv:2404.14469; code: FasterDecoding/SnapKV.
Departures: one decision per KV head, by the mean over its query heads (the code stores every query head's own keys);
prompts that come in chunks or turns are selected from one by one.
"""

from kvmosaic.recipe import Recipe
from kvmosaic.selection import Budget, Pyramid, TopTokens, WindowAttention


def snapkv(
    keep: float | None = None,
    *,
    tokens: int | None = None,
    window: int = 32,
    kernel: int = 7,
    pooling: str = "max",
    pyramid: bool = False,
    head_floor: float | None = None,
) -> Recipe:
    """keep: share of the prompt's tokens that stays in each KV head; or tokens: how many. 0.25 if neither is given.

    window: how many of the last queries score the others, and themselves stay. kernel, pooling: of the scores over
        neighbouring tokens.
    pyramid: more tokens in lower layers (PyramidKV, arXiv:2406.02069). head_floor: heads compete for tokens (AdaKV,
        arXiv:2407.11550, which has 0.2). Generated tokens all stay.
    """
    return Recipe(
        selection=TopTokens(
            scorer=WindowAttention(window, kernel, pooling),
            budget=Budget.of(keep, tokens),
            recent=window,
            layers=Pyramid() if pyramid else None,
            head_floor=head_floor,
        )
    )
