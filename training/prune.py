"""Makes a checkpoint's MLPs narrower: `python training/prune.py mosaic-lm --start FOLDER --width 736 --out FOLDER`.

Hidden units are removed one at a time, each time the one whose loss changes the MLP's output least on task data, and the
output matrix is corrected after each by least squares (optimal brain surgeon, on the Gram matrix of the hidden units).
"""

import argparse
import random
from pathlib import Path
from typing import Any

import lm
import torch
import vlm
from common import Batch, save_checkpoint
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer


def grams(model: Any, batches: list[Batch]) -> list[Tensor]:
    """For each layer, the mean outer product of what enters its down projection: [width, width] float64."""
    layers = model.get_decoder().layers
    width = layers[0].mlp.down_proj.in_features
    sums = [torch.zeros(width, width, dtype=torch.float64) for _ in layers]

    def watch(layer: int) -> Any:
        def add(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            hidden = arguments[0].flatten(0, -2).float()
            sums[layer] += (hidden.mT @ hidden).double() / hidden.shape[0]

        return add

    hooks = [layer.mlp.down_proj.register_forward_pre_hook(watch(index)) for index, layer in enumerate(layers)]
    with torch.no_grad():
        for batch in batches:
            model(
                input_ids=batch.ids,
                use_cache=False,
                **({} if batch.pixels is None else {"pixel_values": batch.pixels.float().div(127.5).sub(1)}),
            )
    for hook in hooks:
        hook.remove()
    return [total / len(batches) for total in sums]


def surviving_units(down: Tensor, gram: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Which `width` hidden units stay, and the corrected output matrix [outputs, width].

    down: [outputs, inputs] float64; gram: [inputs, inputs] float64.
    """
    damping = 1e-4 * gram.diagonal().mean()
    inverse = torch.linalg.inv(gram + damping * torch.eye(len(gram), dtype=gram.dtype))
    down = down.clone()
    alive = torch.ones(len(gram), dtype=torch.bool)
    for _ in range(len(gram) - width):
        cost = down.square().sum(0) / inverse.diagonal()
        unit = int(cost.masked_fill(~alive, torch.inf).argmin())
        column = inverse[:, unit].clone()
        down -= torch.outer(down[:, unit], column) / column[unit]
        inverse -= torch.outer(column, column) / column[unit]
        alive[unit] = False
    kept = alive.nonzero().flatten()
    return kept, down[:, kept]


def narrow(model: Any, batches: list[Batch], width: int) -> None:
    """Narrows every MLP of the language model in place, and its config."""
    with torch.no_grad():
        for layer, gram in zip(model.get_decoder().layers, grams(model, batches), strict=True):
            mlp = layer.mlp
            kept, down = surviving_units(mlp.down_proj.weight.double(), gram, width)
            mlp.down_proj.weight = nn.Parameter(down.float())
            mlp.gate_proj.weight = nn.Parameter(mlp.gate_proj.weight[kept].clone())
            mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight[kept].clone())
    model.config.get_text_config().intermediate_size = width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=("mosaic-lm", "mosaic-vlm"))
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--batches", type=int, default=12, help="of 8192 tokens, to choose the units by")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.start)
    auto, draw = (
        (AutoModelForCausalLM, lm.draw) if arguments.model == "mosaic-lm" else (AutoModelForImageTextToText, vlm.draw)
    )
    model = auto.from_pretrained(arguments.start, dtype=torch.float32).eval()
    seeds = random.Random(0)
    narrow(
        model,
        [draw(tokenizer, 8192, seeds.getrandbits(32)).to("cpu") for _ in range(arguments.batches)],
        arguments.width,
    )
    save_checkpoint(model, tokenizer, arguments.out)


if __name__ == "__main__":
    main()
