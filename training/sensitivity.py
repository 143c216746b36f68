"""How much a checkpoint suffers when its cache is quantized: `python training/sensitivity.py mosaic-vlm --json FILE`.

The cache of the context is rounded in place, nothing is packed: a quick look at the instrument itself, independent of the
package's own stores. mosaic-vlm: visual tokens only, one range per channel over them, as CalibQuant has it. mosaic-lm: all
tokens but the newest 32, as KIVI has it.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import score
import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    DynamicCache,
)
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kvmosaic import bundled

IMAGE = 2047
Rounding = Callable[[Tensor], Tensor]  # [B, H, S, D] to the same


class Calibration:
    """CalibQuant's calibrated logits: those of visual tokens are mapped from [low, high] to [low, high - tau]."""

    tau: float = 0.0
    visual: Tensor | None = None  # [S] bool, over the context


def attention(
    module: Any, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float, **rest: Any
) -> tuple[Tensor, None]:
    groups = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    logits = query @ keys.mT * scaling  # [B, H, T, S]
    is_prefill = query.shape[2] == keys.shape[2]  # the context itself is read exactly
    if Calibration.tau and Calibration.visual is not None and not is_prefill:
        places = Calibration.visual.nonzero().flatten()
        seen = logits[..., places]
        low, high = seen.amin(-1, keepdim=True), seen.amax(-1, keepdim=True)
        tau = (0.999 * (high - low)).clamp(max=Calibration.tau)  # the slope stays positive
        logits[..., places] = low + (seen - low) * (1 - tau / (high - low + 1e-8))
    new, stored = logits.shape[-2:]
    future = torch.ones(new, stored, dtype=torch.bool).triu(stored - new + 1)
    return (logits.masked_fill(future, -torch.inf).softmax(-1) @ values).transpose(1, 2).contiguous(), None


def uniform(bits: int, dim: int, shrink: float = 1.0, group: int | None = None) -> Rounding:
    """Round to 2^bits levels between the ends of the range along `dim`, each end first multiplied by `shrink`."""

    def rounded(x: Tensor) -> Tensor:
        if group:
            whole = x.shape[dim] // group * group
            blocks = x.narrow(dim, 0, whole).unflatten(dim, (-1, group))
            done = uniform(bits, dim + 1, shrink)(blocks).flatten(dim, dim + 1)
            return torch.cat([done, x.narrow(dim, whole, x.shape[dim] - whole)], dim)
        low, high = x.amin(dim, keepdim=True) * shrink, x.amax(dim, keepdim=True) * shrink
        step = (high - low).clamp_min(1e-9) / (2**bits - 1)
        return ((x - low) / step).round().clamp(0, 2**bits - 1) * step + low

    return rounded


VISION: dict[str, tuple[Rounding, Rounding, float]] = {  # keys, values, tau
    "4 bits": (uniform(4, 2), uniform(4, 2), 0),
    "2 bits": (uniform(2, 2), uniform(2, 2), 0),
    "1 bit": (uniform(1, 2), uniform(1, 2), 0),
    "1 bit, calibrated tau 3": (uniform(1, 2), uniform(1, 2), 3),
    "1 bit, shrunk 0.5 / 0.3": (uniform(1, 2, 0.5), uniform(1, 2, 0.3), 0),
}
TEXT: dict[str, tuple[Rounding, Rounding, float]] = {
    **{f"kivi {bits} bits": (uniform(bits, 2, group=32), uniform(bits, 3), 0) for bits in (8, 4, 2, 1)},
    "per token 2 bits": (uniform(2, 3), uniform(2, 3), 0),
    "per channel 4 bits": (uniform(4, 2), uniform(4, 2), 0),
    "per channel 2 bits": (uniform(2, 2), uniform(2, 2), 0),
}


def changer(keys: Rounding, values: Rounding, tau: float, vision: bool) -> score.Change:
    def change(cache: DynamicCache, ids: Tensor) -> None:
        rounded = ids == IMAGE if vision else torch.arange(len(ids)) < len(ids) - 32
        Calibration.tau, Calibration.visual = tau, rounded
        for layer in cache.layers:
            layer.keys[:, :, rounded] = keys(layer.keys[:, :, rounded])
            layer.values[:, :, rounded] = values(layer.values[:, :, rounded])

    return change


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=bundled.NAMES)
    parser.add_argument("--folder", type=Path, help="another checkpoint than the bundled one")
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    vision = arguments.model == "mosaic-vlm"
    folder = arguments.folder or bundled.path(arguments.model)
    auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    AttentionInterface.register("calibrated", attention)
    AttentionMaskInterface.register("calibrated", sdpa_mask)
    model.set_attn_implementation({"text_config": "calibrated"} if vision else "calibrated")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    task, options = ("rows", {"tiles": 16}) if vision else ("lines", {"lines": 110})
    table = []
    for name, change in {
        "exact": None,
        **{name: changer(*method, vision) for name, method in (VISION if vision else TEXT).items()},
    }.items():
        row = score.score(model, tokenizer, task, options, arguments.examples, 0, change)
        table.append({"method": name, **row})
        print(table[-1], flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
