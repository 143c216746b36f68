"""kvmosaic generate"""

import time
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape

from kvmosaic import decoding, methods
from kvmosaic.cli.output import Device, Dtype, console, open_quietly
from kvmosaic.evals.example import PICTURE
from kvmosaic.hooks.attach import cache_in
from kvmosaic.loading import open_picture


class Printer:
    """What generate hands tokens to: prints the text as it grows, and notes when the first and the last token came."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.printed = ""
        self.prompt = True
        self.first = self.last = 0.0

    def put(self, tokens: torch.Tensor) -> None:
        if self.prompt:  # generate sends the prompt first
            self.prompt = False
            return
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.ids += tokens.flatten().tolist()
        self._print(final=False)

    def end(self) -> None:
        self._print(final=True)
        console.print()

    def _print(self, final: bool) -> None:
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if final or not text.endswith("\ufffd"):  # half of a character
            console.print(escape(text[len(self.printed) :]), end="", highlight=False, soft_wrap=True)
            self.printed = text


def generate(
    model: Annotated[str, typer.Option(help="mosaic-lm, mosaic-vlm, a folder, or a name on the hub.")],
    prompt: Annotated[str, typer.Option(help=f"Text; {PICTURE} where a picture goes (else pictures come first).")],
    method: Annotated[
        str, typer.Option(help='How the cache is kept, e.g. "calibquant bits=1 | kivi bits=2".')
    ] = "exact",
    image: Annotated[list[str] | None, typer.Option(metavar="FILE", help="A picture; may be repeated.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most this many tokens.")] = 128,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens instead of taking the likeliest.")] = False,
    temperature: Annotated[float, typer.Option(min=0.01, help="With --sample.")] = 1.0,
    seed: Annotated[int, typer.Option(help="With --sample.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Do not put the prompt into the model's chat template.")] = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
) -> None:
    """Streams the text, then one line of memory and speed."""
    recipe = methods.parse(method)
    pictures = [open_picture(file) for file in image or ()]
    opened = open_quietly(model, dtype, device)
    missing = PICTURE * (len(pictures) - prompt.count(PICTURE))
    inputs = opened.inputs(missing + prompt if raw else opened.chat(prompt, pictures), pictures)
    options: dict[str, Any] = {"do_sample": True, "temperature": temperature} if sample else {"do_sample": False}
    torch.manual_seed(seed)
    printer = Printer(opened.tokenizer)
    begin = time.perf_counter()
    options |= {"max_new_tokens": max_new_tokens, "streamer": printer, "return_dict_in_generate": True}
    cache = cache_in(decoding.generate(opened.model, method=recipe, **(inputs | options)))
    speed = f"prompt {printer.first - begin:.2f} s"
    if len(printer.ids) > 1:
        each = (printer.last - printer.first) / (len(printer.ids) - 1)
        speed += f", then {1000 * each:.1f} ms per token ({1 / each:.1f} tokens/s)"
    console.print(f"[dim]{escape(recipe.name)}: {cache.report()}; {speed}[/]", soft_wrap=True, highlight=False)
