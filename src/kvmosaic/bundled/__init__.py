"""The two small models that ship with the package. `training/README.md` says how they were made and how good they are.

Each is a plain Hugging Face folder: `AutoModelForCausalLM.from_pretrained(path("mosaic-lm"))`,
`AutoModelForImageTextToText.from_pretrained(path("mosaic-vlm"))` and `AutoTokenizer` work on it without this package.
Pictures for mosaic-vlm are prepared by `kvmosaic.bundled.pictures`.
"""

import difflib
import json
from pathlib import Path
from typing import Any

from kvmosaic.errors import BadCheckpoint

NAMES = ("mosaic-lm", "mosaic-vlm")
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def path(name: str) -> Path:
    """The folder of bundled model `name`. Raises ValueError if there is no such model, BadCheckpoint if files are gone."""
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(NAMES)}."
        raise ValueError(f"no bundled model {name!r}. {hint}")
    folder = Path(__file__).parent / name
    check(folder)
    return folder


def check(folder: Path) -> None:
    """Raises BadCheckpoint if a file of the checkpoint is missing, unreadable or cut short. Reads no weights."""
    advice = "Install kvmosaic again, or restore the folder from the repository."
    for file in FILES:
        if not (folder / file).is_file():
            raise BadCheckpoint(f"checkpoint {folder} lacks {file}. {advice}")
        if file.endswith(".json"):
            try:
                json.loads((folder / file).read_text())
            except ValueError as error:
                raise BadCheckpoint(f"{folder / file} is not JSON ({error}). {advice}") from error
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    with weights.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:  # a safetensors file is the header's length, the header (JSON), the tensors
            header = json.loads(stream.read(min(length, size)))
            expected = 8 + length + max(tensor["data_offsets"][1] for key, tensor in header.items() if key[:2] != "__")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadCheckpoint(f"{weights} has no safetensors header. {advice}") from error
    if size != expected:
        raise BadCheckpoint(f"{weights} should hold {expected} bytes, but holds {size}. {advice}")


def load(name: str, dtype: Any = "auto") -> tuple[Any, Any]:
    """The model, in eval mode, and the tokenizer of bundled model `name`.

    dtype: a torch dtype, or "auto" for the checkpoint's own (bfloat16).
    Raises as `path` does.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    folder = path(name)
    auto = AutoModelForImageTextToText if name == "mosaic-vlm" else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=dtype).eval(), AutoTokenizer.from_pretrained(folder)
