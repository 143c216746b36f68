"""Running a command in this process."""

import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from kvmosaic.cli import main
from kvmosaic.cli.output import console


class Ran(NamedTuple):
    """status: what the shell would see."""

    status: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        return json.loads(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """run("plan", "--model", "qwen3-8b") -> Ran."""
    monkeypatch.setattr(console, "width", 160)

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["kvmosaic", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        code = left.value.code
        output = capsys.readouterr()
        return Ran(code if isinstance(code, int) else int(code is not None), output.out, output.err)

    return run
