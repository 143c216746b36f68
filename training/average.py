"""Averages two checkpoints of one shape: `python training/average.py mosaic-vlm FIRST SECOND --share 0.5 --out FOLDER`.

Half-way between a checkpoint and what a short, noisy training made of it, old tasks come back and new ones partly stay.
"""

import argparse
from pathlib import Path

import torch
from common import save_checkpoint
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from kvmosaic import bundled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=bundled.NAMES)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--share", type=float, default=0.5, help="of the second")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    auto = AutoModelForImageTextToText if arguments.model == "mosaic-vlm" else AutoModelForCausalLM
    first, second = (
        auto.from_pretrained(folder, dtype=torch.float32) for folder in (arguments.first, arguments.second)
    )
    with torch.no_grad():
        for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
            ours.lerp_(theirs, arguments.share)
    save_checkpoint(first, AutoTokenizer.from_pretrained(arguments.second), arguments.out)


if __name__ == "__main__":
    main()
