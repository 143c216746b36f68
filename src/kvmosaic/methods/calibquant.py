"""CalibQuant: visual tokens at 1 bit, one range per channel, never dequantized, logits calibrated before the softmax.

Han et al., 2025, arXiv:2502.14882 (v2); code: insuhan/calibquant.
We follow the code where it goes beyond the paper (at 1 bit ranges are shrunk to 0.5 for keys and 0.3 for values), and
depart from its faults: visual tokens are found by the model's own placeholder ids, not by a fixed slice; any number of
pictures; ranges in float16, not bfloat16; constant channels are exact; the slope of the calibrated logits stays above
zero (official=True brings back the released behaviour); all state is in the cache.
"""

from pathlib import Path
from typing import Literal

from kvmosaic.calibration import load
from kvmosaic.codecs import Uniform
from kvmosaic.kernels.attention import Affine
from kvmosaic.recipe import Recipe
from kvmosaic.stores import Coded, Lane, PerLayer

RELEASED_KEY_CLIP, RELEASED_VALUE_CLIP = 0.5, 0.3
"""What the released code shrinks ranges to at 1 bit; with more bits it does not."""


def calibquant(
    bits: int = 1,
    *,
    key_bits: int | None = None,
    value_bits: int | None = None,
    key_clip: float | None = None,
    value_clip: float | None = None,
    clip_about: Literal["zero", "center"] = "zero",
    calibrated: bool | None = None,
    low: float = 0.0,
    high: float = 3.0,
    official: bool = False,
    by_picture: bool = False,
    text: Recipe | None = None,
    calibration: str | Path | None = None,
) -> Recipe:
    """bits: of a visual token's codes: 1, 2, 4 or 8; key_bits and value_bits if the sides differ.

    key_clip, value_clip: share of each channel's range that the levels span; None = 0.5 and 0.3 at 1 bit, 1 above.
    clip_about: "zero" as released, or "center" (channels far from zero keep their levels).
    calibrated: map the visual logits of each query from [least, greatest] to [least - low, greatest - high]; None = for
        keys of 1 and 2 bits, as released. low, high: the paper's tau1 and tau2.
    official: let the slope of that map fall below zero, as the released code does.
    by_picture: ranges for each picture (each unbroken run of visual tokens) instead of for each prompt.
    text: another recipe for the tokens that are not visual (exact if None); the same as `calibquant(...) | text`.
    calibration: a file of `kvmosaic calibrate --method calibquant` with clips and offsets per layer, in place of
        key_clip, value_clip, low and high.
    """
    key_bits, value_bits = (bits if each is None else each for each in (key_bits, value_bits))
    if calibrated is None:
        calibrated = key_bits in (1, 2)

    def tier(key_clip: float | None, value_clip: float | None, affine: Affine | None) -> Coded:
        if key_clip is None:
            key_clip = RELEASED_KEY_CLIP if key_bits == 1 else 1.0
        if value_clip is None:
            value_clip = RELEASED_VALUE_CLIP if value_bits == 1 else 1.0
        keys = Uniform(bits=key_bits, axis="channel", clip=key_clip, clip_about=clip_about)
        values = Uniform(bits=value_bits, axis="channel", clip=value_clip, clip_about=clip_about)
        return Coded(Lane(keys), Lane(values), affine)

    visual: Coded | PerLayer
    fingerprint = None
    if calibration is None:
        visual = tier(key_clip, value_clip, Affine(low, high, official) if calibrated else None)
    else:
        found = load(calibration, method="calibquant", options={"key_bits": key_bits, "value_bits": value_bits})
        clip_about, fingerprint = found.options["clip_about"], found.fingerprint
        columns = zip(
            *(found.tensors[name].tolist() for name in ("key_clip", "value_clip", "low", "high")), strict=True
        )
        visual = PerLayer(
            tuple(tier(key, value, Affine(low, high) if low or high else None) for key, value, low, high in columns)
        )
    recipe = Recipe(visual=visual, visual_by_picture=by_picture or None, fingerprint=fingerprint)
    return recipe if text is None else recipe | text
