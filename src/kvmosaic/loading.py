"""Opening a model by name, with what turns text and pictures into its inputs."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from kvmosaic import bundled
from kvmosaic.bundled import pictures as tiles
from kvmosaic.errors import BadCheckpoint, BadPicture
from kvmosaic.evals.example import PICTURE
from kvmosaic.hooks import models

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Opened:
    """A model in eval mode, its tokenizer, and its processor if it has one (the bundled models have none)."""

    name: str
    model: Any
    tokenizer: Any
    processor: Any | None = None

    @property
    def takes_pictures(self) -> bool:
        return bool(models.visual_ids(self.model.config))

    def inputs(self, text: str, pictures: Sequence[Image.Image] = ()) -> dict[str, Tensor]:
        """What `model.generate(**inputs)` takes. `text` has one "<image>" for each picture.

        Raises BadPicture for pictures that the model does not take, or unless there are as many as markers.
        """
        if pictures and not self.takes_pictures:
            raise BadPicture(
                f"{self.name} reads text only, and {len(pictures)} pictures came. Use a vision-language model, "
                "for example --model mosaic-vlm"
            )
        if text.count(PICTURE) != len(pictures):
            raise BadPicture(
                f"the prompt has {text.count(PICTURE)} {PICTURE} markers for {len(pictures)} pictures. Write one for each"
            )
        if self.processor is None:
            made = tiles.inputs(self.tokenizer, text, pictures)
        elif pictures:
            token = getattr(self.processor, "image_token", PICTURE)
            made = self.processor(text=text.replace(PICTURE, token), images=list(pictures), return_tensors="pt")
        else:
            made = self.tokenizer(text, return_tensors="pt")
        return {key: self._to_device(value) for key, value in made.items() if key != "token_type_ids"}

    def chat(self, text: str, pictures: Sequence[Image.Image] = ()) -> str:
        """`text` as the user's turn of the model's chat template, pictures first; as it is if there is no template."""
        renderer: Any = self.processor if getattr(self.processor, "chat_template", None) else self.tokenizer
        if not getattr(renderer, "chat_template", None):
            return PICTURE * (len(pictures) - text.count(PICTURE)) + text
        if not self.takes_pictures:
            turn: Any = text
        else:
            words = {"type": "text", "text": text.replace(PICTURE, "").strip()}
            turn = [*({"type": "image"} for _ in pictures), words]
        rendered: str = renderer.apply_chat_template(
            [{"role": "user", "content": turn}], tokenize=False, add_generation_prompt=True
        )
        return rendered.replace(getattr(self.processor, "image_token", PICTURE), PICTURE)

    def ids(self, text: str) -> Tensor:
        """The tokens of a text that follows others, [1, T]."""
        ids: Tensor = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        return ids.to(self.model.device)

    def _to_device(self, value: Tensor) -> Tensor:
        return value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)


def open_model(name: str, dtype: str = "auto", device: str = "cpu") -> Opened:
    """A bundled model, a folder, or a name on the Hugging Face hub.

    dtype: "auto" is the checkpoint's own, so that the cache's bytes are those that the model's users see.
    Raises BadCheckpoint, with the reason, for what cannot be opened, and ValueError for an unknown dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    source = str(bundled.path(name)) if name in bundled.NAMES else name
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise BadCheckpoint(f"{name} is a folder without config.json. Give the folder that save_pretrained wrote")
    import transformers

    config = read_config(source, bundled.NAMES)
    visual = bool(models.visual_ids(config))
    auto = transformers.AutoModelForImageTextToText if visual else transformers.AutoModelForCausalLM
    try:
        model, found = auto.from_pretrained(source, config=config, dtype=DTYPES[dtype], output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise BadCheckpoint(
            f"cannot load the weights or the tokenizer of {name}: {_first_line(error)}. Fetch or copy the checkpoint again"
        ) from error
    if found["missing_keys"]:
        raise BadCheckpoint(
            f"{name} lacks {len(found['missing_keys'])} weights, for example {min(found['missing_keys'])}. Fetch or copy "
            "the checkpoint again"
        )
    try:
        model = model.eval().to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {_first_line(error)}") from error
    return Opened(name, model, tokenizer, _processor(source) if visual else None)


def read_config(source: str, names: Sequence[str]) -> Any:
    """The config in a folder, a file, or on the hub. names: what else could have been asked for, for the message.

    Raises BadCheckpoint if there is none.
    """
    from transformers import AutoConfig

    known = f"There are: {', '.join(names)}; a folder or file; or a name on the hub, as owner/name"
    if not Path(source).exists() and source.count("/") != 1:
        near = difflib.get_close_matches(source, names, 1)
        raise BadCheckpoint(f"no model {source!r}. " + (f"Did you mean {near[0]!r}?" if near else known))
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries would hide our one line
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise BadCheckpoint(f"cannot read the config of {source!r} ({_first_line(error)}). {known}") from error


def open_picture(path: str | Path) -> Image.Image:
    """The picture in a file, in RGB. Raises BadPicture if it is missing or damaged."""
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadPicture(
            f"cannot read the picture {path}: {_first_line(error)}. Give a PNG, JPEG or WebP file"
        ) from error


def _processor(source: str) -> Any | None:
    """None for a folder with a tokenizer alone, as the bundled models are."""
    from transformers import AutoProcessor, ProcessorMixin

    if Path(source).is_dir() and not any(
        (Path(source) / f"{kind}_config.json").is_file() for kind in ("processor", "preprocessor")
    ):
        return None
    try:
        processor = AutoProcessor.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise BadCheckpoint(f"cannot load the processor of {source}: {_first_line(error)}") from error
    return processor if isinstance(processor, ProcessorMixin) else None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
