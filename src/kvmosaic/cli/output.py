"""What the commands share: tables and their JSON, files that are written whole or not at all, progress, quiet loading."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvmosaic.loading import Opened, open_model
from kvmosaic.report import size

console = Console(width=None if sys.stdout.isatty() else 160)
"""A pipe has no width of its own, and 80 columns would fold the words."""
error_console = Console(stderr=True)

Json = Annotated[
    str | None,
    typer.Option(
        "--json", metavar="FILE", help="Also write the table as JSON, a list of objects; - for standard output."
    ),
]
Dtype = Annotated[
    str,
    typer.Option(help="auto (the checkpoint's own), float32, bfloat16 or float16. The cache's bytes follow it."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]


def show(
    rows: Sequence[dict[str, Any]], title: str, json_file: str | None, note: str = "", hide: Sequence[str] = ()
) -> None:
    """Print rows as a table and write them as JSON; all rows have the same keys. hide: keys for JSON alone.

    A key says how its values are printed: `..._bytes` and `bytes_...` as sizes, `seconds...` as times. JSON has bytes
    and seconds.
    """
    if json_file == "-":
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
        return
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown = [key for key in (rows[0] if rows else ()) if key not in hide]
    for key in shown:
        numeric = all(isinstance(row[key], int | float | None) for row in rows)
        heading = key.removesuffix("_bytes").replace("seconds", "time").replace("_", "\n")
        table.add_column(heading, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for row in rows:
        table.add_row(*(escape(text(key, row[key])) for key in shown))
    console.print(table)
    if note:
        console.print(f"[dim]{escape(note)}[/]", highlight=False)
    if json_file is not None:
        with whole_file(json_file) as part:
            part.write_text(json.dumps(rows, indent=1) + "\n")


def text(key: str, value: Any) -> str:
    """One cell of a table, for people."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key.endswith("bytes") or "bytes_per" in key:
        return size(value)
    if key.startswith("seconds"):
        return f"{1000 * value:.1f} ms" if value < 1 else f"{value:.1f} s"
    if isinstance(value, float):
        return f"{value:.2f}x" if key == "compression" else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path to write to; it becomes `path` at the end, or, if anything fails, nothing is left behind."""
    path = Path(path)
    part = path.with_name(f"{path.stem}.part{path.suffix}")  # libraries read the format off the suffix
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def progress() -> Progress:
    """A bar on stderr, so that a table on standard output can be piped."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=error_console, transient=True)


def open_quietly(name: str, dtype: str = "auto", device: str = "cpu") -> Opened:
    """`open_model` with one spinner in place of transformers' bars and warnings."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # transformers 5.24 says at every call that past_key_values will be called cache; both names work
    warnings.filterwarnings("ignore", message=".*`past_key_values` is deprecated", category=FutureWarning)
    with error_console.status(f"loading {name}"):
        return open_model(name, dtype, device)
