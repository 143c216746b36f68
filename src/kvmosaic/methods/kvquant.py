"""KVQuant: keys per channel before their rotary positions, values per token, learned levels, outliers kept apart.

Hooper et al., NeurIPS 2024, arXiv:2401.18079; code: SqueezeAILab/KVQuant.
We follow the paper where the code differs: levels weighted by Fisher information times the squared range (the code: without
the range), first tokens left out of ranges, too; Q-Norm, of the early paper and the code, at 2 bits and fewer.
Departures: outliers are counted by head, not by token over all heads, rounded up; they are the numbers that fit worst,
which are those outside the range and, at the same bytes, some others; of values, those whose absence narrows the range
most, not as many above as below; prompts are attended exactly, as the authors' deployment does and their tables do not.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from kvmosaic.calibration import load
from kvmosaic.codecs import Levels
from kvmosaic.codecs.levels import narrowest
from kvmosaic.errors import NeedsCalibration
from kvmosaic.learning import Sample, Side
from kvmosaic.learning import levels as fitted
from kvmosaic.recipe import Recipe
from kvmosaic.stores import Coded, Lane, PerLayer


def kvquant(
    bits: int = 4,
    *,
    outliers: float = 0.01,
    pre_rope: bool = True,
    window: int = 0,
    first: int = 1,
    calibration: str | Path | None = None,
) -> Recipe:
    """bits: of a code: 1, 2, 3 or 4 (the paper has 2, 3 and 4); a value's range adds 32 bits a token and head.

    outliers: share of a token's numbers that is kept exact, in each head, rounded up to whole numbers of 24 bits.
    pre_rope: keys are coded before their rotary positions, and rotated when they are read, which is slow.
    window, first: how many of the newest and of the first tokens stay exact (the paper: none and one).
    calibration: a file of `kvmosaic calibrate --method "kvquant bits=..."`, made with the same bits, outliers and pre_rope.
    """
    if calibration is None:
        raise NeedsCalibration(
            f'kvquant has no levels. Learn them with: kvmosaic calibrate --method "kvquant bits={bits}" --model NAME '
            "--data FILE --out LEVELS, and give them as calibration=LEVELS"
        )
    found = load(calibration, method="kvquant", options={"bits": bits, "outliers": outliers, "pre_rope": pre_rope})

    def tier(tensors: dict[str, Tensor]) -> Coded:
        ranges = tensors["key ranges"]
        count = math.ceil(outliers * ranges.shape[2])
        keys, values = (
            Levels(levels=tensors[f"{side} levels"], restored=tensors[f"{side} restored"], ranges=own, outliers=count)
            for side, own in (("key", ranges), ("value", None))
        )
        return Coded(Lane(keys, window, pre_rope=pre_rope), Lane(values, window))

    tiers = PerLayer.of({layer: tier(tensors) for layer, tensors in found.by_layer().items()})
    return Recipe(tiers=(tiers,), first=first or None, fingerprint=found.fingerprint)


def learn(
    sample: Sample,
    *,
    bits: int = 4,
    outliers: float = 0.01,
    pre_rope: bool = True,
    first: int = 1,
    fisher: bool = True,
    normalize: bool | None = None,
) -> dict[str, Tensor]:
    """fisher: weigh numbers by their squared gradient and range; else all alike. normalize: Q-Norm; None = up to 2 bits.

    The others as in `kvquant`. Returns key ranges [2, H, D] float16, and for each side levels and restored [2**bits].
    """
    sample = sample.after(first)
    if bits not in (1, 2, 3, 4):
        raise ValueError(f"bits must be 1, 2, 3 or 4, got {bits}")
    if not 0 <= outliers < 1:
        raise ValueError(f"outliers are a share of the numbers, at least 0 and below 1, got {outliers}")
    if len(sample) < 2**bits:
        raise ValueError(
            f"{2**bits} levels need {2**bits} tokens at least to learn from, got {len(sample)}. Give more --sequences or a "
            "larger --length"
        )
    if pre_rope and sample.unrotated is None:
        raise ValueError("the model's keys have no form before their rotary positions. Give pre_rope=False")
    keys = sample.unrotated if pre_rope and sample.unrotated is not None else sample.keys
    normalize = bits <= 2 if normalize is None else normalize
    ranges = _by_channel(keys.numbers, outliers)
    by_token = torch.stack(narrowest(sample.values.numbers, math.ceil(outliers * sample.values.numbers.shape[-1])))
    key, value = (
        _levels(side, own.float(), 2**bits, fisher, normalize)
        for side, own in ((keys, ranges[:, :, None]), (sample.values, by_token))
    )
    return {
        "key ranges": ranges,
        **{f"key {name}": each for name, each in key.items()},
        **{f"value {name}": each for name, each in value.items()},
    }


def _by_channel(x: Tensor, outliers: float) -> Tensor:
    """[2, H, D] float16: middle and half width of each channel's numbers [H, N, D], without `outliers` of them, half of these
    at each end."""
    ordered, cut = x.sort(1).values, round(outliers / 2 * (x.shape[1] - 1))
    low, high = ordered[:, cut], ordered[:, x.shape[1] - 1 - cut]
    return torch.stack([(low + high) / 2, (high - low) / 2]).to(torch.float16)


def _levels(side: Side, ranges: Tensor, count: int, fisher: bool, normalize: bool) -> dict[str, Tensor]:
    """ranges [2, H, 1 or N, 1 or D]: middle and half."""
    middle, half = ranges
    unit = (side.numbers - middle) / torch.where(half > 0, half, 1.0)
    inside = (unit.abs() <= 1) & (half > 0)  # what does not vary needs no levels
    weights = side.weights * half.square() if fisher else torch.ones_like(unit)
    unit, weights = unit[inside], weights[inside]
    if len(unit) < count:
        raise ValueError(f"{count} levels need as many numbers that vary, and there are {len(unit)}. Give other data")
    levels = fitted(unit, weights, count)
    restored = levels.clone()
    if normalize:
        rounded = levels[torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2)]
        stretch = unit.std() / rounded.std().clamp_min(1e-6)
        restored = levels * stretch + (unit.mean() - rounded.mean() * stretch)
    return {"levels": levels, "restored": restored}
