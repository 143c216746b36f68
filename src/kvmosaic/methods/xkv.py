"""XKV: budgets by layer, from a profile of how much importance each layer loses with fewer tokens.

Li et al., 2024, arXiv:2412.05896; code: CN-LWZ/XKV. (Not abdelfattah-lab's xKV, arXiv:2503.18893, another system.)
Departures: profiles are kept as shares of a prompt's tokens, so that one serves prompts of any length (the code keeps
counts); one decision per KV head; the scorer is free (the code has SnapKV's).
"""

from pathlib import Path

from kvmosaic.calibration import load
from kvmosaic.errors import NeedsCalibration
from kvmosaic.recipe import Recipe
from kvmosaic.selection import AttentionSums, Budget, ExpectedAttention, Scorer, TopTokens, WindowAttention
from kvmosaic.selection.layers import Profiled

SCORERS: dict[str, Scorer] = {
    "snapkv": WindowAttention(8, 7, "mean"),
    "h2o": AttentionSums(),
    "expected_attention": ExpectedAttention(),
}
"""What can score tokens here; the first is the paper's."""


def xkv(
    keep: float | None = None,
    *,
    tokens: int | None = None,
    profile: str | Path | None = None,
    scorer: str = "snapkv",
    recent: int = 8,
) -> Recipe:
    """keep: share of the prompt's tokens that stays, in the mean over layers; or tokens: how many. 0.25 if neither is.

    profile: a file of `kvmosaic profile`, made with the same scorer. recent: the newest tokens, which always stay.
    Generated tokens all stay.
    """
    if scorer not in SCORERS:
        raise ValueError(f"no scorer {scorer!r}. There are: {', '.join(SCORERS)}")
    if profile is None:
        raise NeedsCalibration(
            "xkv has no profile of the layers. Make one with: kvmosaic profile --model NAME --data FILE --out PROFILE, "
            "and give it as profile=PROFILE"
        )
    found = load(profile, method="xkv", options={"scorer": scorer})
    selection = TopTokens(
        scorer=SCORERS[scorer], budget=Budget.of(keep, tokens), recent=recent, layers=Profiled(found.tensors["gains"])
    )
    return Recipe(selection=selection, fingerprint=found.fingerprint)
