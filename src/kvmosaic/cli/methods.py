"""kvmosaic methods"""

import inspect
import re
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.markup import escape

from kvmosaic import methods as registry
from kvmosaic.cli.output import Json, console, show
from kvmosaic.errors import NeedsCalibration


def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One method, with its options.")] = None,
    json_file: Json = None,
) -> None:
    """What exists: paper, options and their defaults, bits, and what a method needs."""
    if name is None:
        show([row(each) for each in registry.names()], "methods", json_file, "More on one: kvmosaic methods NAME")
        return
    method = registry.get(name)
    if json_file != "-":
        console.print(
            escape(inspect.getdoc(inspect.getmodule(inspect.unwrap(method))) or ""), highlight=False, soft_wrap=True
        )
        console.print()
    show(options(name), f"options of {name}", json_file, f'On the command line: --method "{name} option=value ..."')


def row(name: str) -> dict[str, Any]:
    """One line of the table of methods, read off the method itself: `README.md` has the same."""
    method = registry.get(name)
    document = inspect.getdoc(inspect.getmodule(inspect.unwrap(method))) or ""
    parameters = inspect.signature(method).parameters
    paper = re.search(r"arXiv:\d{4}\.\d{4,5}", document)
    bits = re.search(r"\b1, 2, 4 or 8\b", inspect.getdoc(method) or "")
    calibration = "optional" if "calibration" in parameters else None
    try:
        needs = "pictures" if method().visual is not None else "nothing"
    except NeedsCalibration:
        needs, calibration = "nothing", "needed"
    return {
        "name": name,
        "what": document.splitlines()[0],
        "paper": paper[0] if paper else None,
        "bits": bits[0] if bits else None,
        "default": parameters["bits"].default if "bits" in parameters else None,
        "needs": needs,
        "calibration": calibration,
    }


def options(name: str) -> list[dict[str, Any]]:
    """The options of a method: from its signature, and what its docstring says of each."""
    method = registry.get(name)
    parameters = inspect.signature(method).parameters
    meanings = meaning(inspect.getdoc(method) or "", list(parameters))
    return [
        {"option": key, "default": str(parameter.default), "meaning": meanings[key]}
        for key, parameter in parameters.items()
    ]


def meaning(document: str, names: Sequence[str]) -> dict[str, str]:
    """What a docstring says of each parameter: in an entry of its own ("name, other: words", or "name if words"), which
    ends where the next begins; else in the first line that mentions it; else nothing."""
    if not names:
        return {}
    lines = re.sub(r"\n[ \t]+", " ", document).splitlines()
    name = f"(?:{'|'.join(map(re.escape, names))})"
    entry = re.compile(rf"(?:^|[.;] (?:or )?)({name}(?:(?:, | and ){name})*)(?:: |(?= if ))")
    found: dict[str, str] = {}
    for line in lines:
        entries = list(entry.finditer(line))
        ends = [each.start() for each in entries[1:]] + [len(line)]
        for each, end in zip(entries, ends, strict=bool(entries)):
            for key in re.split(", | and ", each[1]):
                found.setdefault(key, line[each.end() : end].strip(" .;"))
    for key in names:
        mentions = (line for line in lines if re.search(rf"\b{re.escape(key)}\b", line))
        found.setdefault(key, next(mentions, ""))
    return found
