"""CQ: neighbouring channels share a code, which points to a vector learned for each layer, head and channel group.

Zhang et al., NeurIPS 2024, arXiv:2405.03917; no code by the authors.
From the paper: contiguous groups within a head, k-means weighted by Fisher information (one weight a group and token), no
scales. Departures: keys may be coded after their rotary positions, where logits are sums of looked-up products; first
tokens may stay exact; samples of no weight count a thousandth of the mean. The paper's text was not at hand, so settings
that it does not share with KVQuant are ours.
"""

from pathlib import Path

import torch
from torch import Tensor

from kvmosaic.calibration import load
from kvmosaic.codecs import Coupled
from kvmosaic.errors import NeedsCalibration
from kvmosaic.learning import Sample, Side, kmeans
from kvmosaic.recipe import Recipe
from kvmosaic.stores import Coded, Lane, PerLayer


def cq(
    coupled: int = 4,
    bits: int = 8,
    *,
    pre_rope: bool = False,
    window: int = 0,
    first: int = 0,
    calibration: str | Path | None = None,
) -> Recipe:
    """coupled: channels that share a code. bits: of a code, 1 to 16; bits / coupled per number, and the tables.

    pre_rope: keys are coded before their rotary positions, as in the paper, and rotated when they are read, which is slow.
    window, first: how many of the newest and of the first tokens stay exact (the paper: none of either).
    calibration: a file of `kvmosaic calibrate --method "cq coupled=... bits=..."`, made with the same three settings.
    """
    if calibration is None:
        raise NeedsCalibration(
            f'cq has no tables. Learn them with: kvmosaic calibrate --method "cq coupled={coupled} bits={bits}" --model NAME '
            "--data FILE --out TABLES, and give them as calibration=TABLES"
        )
    found = load(calibration, method="cq", options={"coupled": coupled, "bits": bits, "pre_rope": pre_rope})

    def tier(tensors: dict[str, Tensor]) -> Coded:
        keys = Lane(Coupled(tensors["keys"]), window, pre_rope=pre_rope)
        return Coded(keys, Lane(Coupled(tensors["values"]), window))

    tiers = PerLayer.of({layer: tier(tensors) for layer, tensors in found.by_layer().items()})
    return Recipe(tiers=(tiers,), first=first or None, fingerprint=found.fingerprint)


def learn(
    sample: Sample,
    *,
    coupled: int = 4,
    bits: int = 8,
    pre_rope: bool = False,
    first: int = 0,
    fisher: bool = True,
    seed: int = 0,
) -> dict[str, Tensor]:
    """fisher: weigh samples by the squared gradients of their group; else all alike. The others as in `cq`.

    Returns keys, values: [H, D / coupled, 2**bits, coupled] float16.
    """
    sample = sample.after(first)
    channels = sample.keys.numbers.shape[-1]
    if coupled < 1 or channels % coupled:
        raise ValueError(f"coupled must divide the head size {channels}, got {coupled}")
    if not 1 <= bits <= 16:
        raise ValueError(f"bits of a code are 1 to 16, got {bits}")
    if len(sample) < 2**bits:
        raise ValueError(
            f"codes of {bits} bits need {2**bits} tokens at least to learn from (better 32 times as many), got {len(sample)}. "
            "Give more --sequences, a larger --length or fewer bits"
        )
    if pre_rope and sample.unrotated is None:
        raise ValueError("the model's keys have no form before their rotary positions. Leave pre_rope out")
    keys = sample.unrotated if pre_rope and sample.unrotated is not None else sample.keys
    sides = {"keys": keys, "values": sample.values}
    return {name: _tables(side, coupled, 2**bits, fisher, seed) for name, side in sides.items()}


def _tables(side: Side, coupled: int, count: int, fisher: bool, seed: int) -> Tensor:
    heads = len(side.numbers)

    def grouped(x: Tensor) -> Tensor:  # [H, N, D] -> [H * D / c, N, c]
        return x.unflatten(-1, (-1, coupled)).transpose(1, 2).flatten(0, 1)

    weights = grouped(side.weights).sum(-1) if fisher else torch.ones_like(grouped(side.weights)[..., 0])
    return kmeans(grouped(side.numbers), weights, count, seed=seed).unflatten(0, (heads, -1)).to(torch.float16)
