"""The command line: one file per command."""

import sys

import typer
from rich.markup import escape

from kvmosaic.cli.calibrate import calibrate
from kvmosaic.cli.demo import demo
from kvmosaic.cli.doctor import doctor
from kvmosaic.cli.eval import evaluate
from kvmosaic.cli.generate import generate
from kvmosaic.cli.methods import methods
from kvmosaic.cli.output import error_console
from kvmosaic.cli.plan import plan
from kvmosaic.cli.profile import profile

app = typer.Typer(
    help="KV caches of language and vision-language models in 1 to 8 real bits per number.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for command in (demo, generate, methods, evaluate, plan, calibrate, profile, doctor):
    app.command("eval" if command is evaluate else command.__name__)(command)


def main() -> None:
    """Runs a command. A user's mistake, or a machine's (no space left), is one line on stderr and exit status 1."""
    try:
        app()
    except (ValueError, RuntimeError, OSError) as error:
        if isinstance(error, RuntimeError) and not type(error).__module__.startswith("kvmosaic"):
            raise  # a fault of ours: its traceback is wanted
        error_console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)
