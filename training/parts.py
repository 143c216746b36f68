"""Cuts a checkpoint's weights into files of at most 15 MB, and joins them again: for a machine that gives back only such.

`python training/parts.py cut FOLDER PREFIX` writes PREFIX-1.safetensors and so on;
`python training/parts.py join mosaic-lm PREFIX FOLDER` makes a checkpoint of them with the bundled model's other files.
"""

import argparse
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from kvmosaic import bundled

LIMIT = 15_000_000


def cut(folder: Path, prefix: Path) -> None:
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in load_file(folder / "model.safetensors").items():
        size += tensor.nbytes
        if size > LIMIT:
            parts.append({})
            size = tensor.nbytes
        parts[-1][name] = tensor
    for number, part in enumerate(parts, start=1):
        save_file(part, f"{prefix}-{number}.safetensors")


def join(name: str, prefix: Path, folder: Path) -> None:
    """Raises ValueError unless the parts hold exactly the tensors of the bundled model."""
    joined: dict[str, Tensor] = {}
    for part in sorted(prefix.parent.glob(f"{prefix.name}-*.safetensors")):
        joined |= load_file(part)
    there = {key: tensor.shape for key, tensor in load_file(bundled.path(name) / "model.safetensors").items()}
    if {key: tensor.shape for key, tensor in joined.items()} != there:
        raise ValueError(f"the parts {prefix}-*.safetensors do not hold the tensors of {name}. Is one missing?")
    folder.mkdir(parents=True, exist_ok=True)
    for file in bundled.FILES:
        shutil.copyfile(bundled.path(name) / file, folder / file)
    save_file(joined, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("cut")
    command.add_argument("folder", type=Path)
    command.add_argument("prefix", type=Path)
    command = commands.add_parser("join")
    command.add_argument("model", choices=bundled.NAMES)
    command.add_argument("prefix", type=Path)
    command.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "cut":
        cut(arguments.folder, arguments.prefix)
    else:
        join(arguments.model, arguments.prefix, arguments.folder)


if __name__ == "__main__":
    main()
