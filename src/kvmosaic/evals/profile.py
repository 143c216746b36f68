"""How the importance of tokens is spread over the slots of each layer, measured on prompts (XKV, arXiv:2412.05896)."""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvmosaic.calibration import Calibration
from kvmosaic.evals import harness
from kvmosaic.evals.example import Example
from kvmosaic.hooks import models
from kvmosaic.loading import Opened
from kvmosaic.recipe import Recipe
from kvmosaic.selection import Scorer, Selection, Step, scorer_of
from kvmosaic.selection.layers import retained

POINTS = 200
"""Steps of a profile: half a percent of the tokens each."""


class Observer(Selection):
    """Keeps every token and notes each layer's scores."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.gains: dict[int, list[Tensor]] = {}

    def assign(self, step: Step) -> Tensor:
        self.gains.setdefault(step.layer, []).append(retained(self.scorer.score(step), POINTS))
        return torch.zeros(step.keys.shape[:3], dtype=torch.int8, device=step.keys.device)

    def expected(self, tokens: int, layer: int, layers: int) -> tuple[int, ...]:
        return (tokens,)


def profile(
    opened: Opened, scorer: str, examples: Sequence[Example], tick: Callable[[], None] = lambda: None
) -> Calibration:
    """What `xkv(profile=FILE)` reads: the mean over prompts of each layer's gains, [layers, POINTS].

    Raises ValueError if there are no prompts.
    """
    if not examples:
        raise ValueError("a profile needs one prompt at least")
    observer, digest = Observer(scorer_of(scorer)), hashlib.sha256()
    for example in examples:
        harness.prefill(opened, Recipe(selection=observer), example)
        digest.update(example.context.encode() + b"\0")
        tick()
    types = models.layer_types(opened.model.config)
    # layers with windows of their own keep what they keep: their gains are not asked for
    nothing = [torch.zeros(POINTS)]
    gains = torch.stack([torch.stack(observer.gains.get(index, nothing)).mean(0) for index in range(len(types))])
    return Calibration(
        method="xkv",
        options={"scorer": scorer},
        fingerprint=models.fingerprint(opened.model.config),
        data=digest.hexdigest(),
        tensors={"gains": gains},
    )
