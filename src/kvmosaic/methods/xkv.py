"""XKV: budgets by layer, from a profile of how much importance each layer loses with fewer tokens.

Li et al., 2024, arXiv:2412.05896; code: CN-LWZ/XKV. (Not abdelfattah-lab's xKV, arXiv:2503.18893, another system.)
Departures: profiles are kept as shares of a prompt's tokens, so that one serves prompts of any length (the code keeps
counts); one decision per KV head; the scorer is free (the code has SnapKV's).
"""

from pathlib import Path

from kvmosaic.calibration import load
from kvmosaic.errors import NeedsCalibration
from kvmosaic.recipe import Recipe
from kvmosaic.selection import Budget, Profiled, TopTokens, budgeted, scorer_of


@budgeted(keep=0.25)
def xkv(
    budget: Budget,
    *,
    profile: str | Path | None = None,
    scorer: str = "snapkv_mean",
    recent: int = 8,
) -> Recipe:
    """profile: a file of `kvmosaic profile`, made with the same scorer.

    scorer: what scores tokens: snapkv_mean (the paper's), snapkv, h2o or expected_attention.
    recent: the newest tokens, which always stay.

    Generated tokens all stay.
    """
    chosen = scorer_of(scorer)
    if profile is None:
        raise NeedsCalibration(
            "xkv has no profile of the layers. Make one with: kvmosaic profile --model NAME --data FILE --out PROFILE, "
            "and give it as profile=PROFILE"
        )
    found = load(profile, method="xkv", options={"scorer": scorer})
    selection = TopTokens(scorer=chosen, budget=budget, recent=recent, layers=Profiled(found.tensors["gains"]))
    return Recipe(selection=selection, fingerprint=found.fingerprint)
