"""What README.md says is so."""

import re
from pathlib import Path

import pytest

from benchmarks import tables
from kvmosaic import methods
from kvmosaic.evals import tasks

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "README.md").read_text()


def test_the_ten_lines_run(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 11
    exec(code, {})
    out = capsys.readouterr().out
    assert "ask red: 12345" in out
    assert "compression" in out and "exact would be" in out


def test_the_table_of_methods_is_the_registry() -> None:
    again = tables.replace_part(PAGE, "methods", tables.methods_table())
    assert again == PAGE, "run: python benchmarks/tables.py"


def test_the_example_of_a_method_is_one() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    recipe = names["window"](newest=16)  # type: ignore[operator]
    assert recipe.tiers[0].keys.window == 16


def test_commands_that_are_shown_name_what_exists() -> None:
    for name in re.findall(r'--method "([a-z]+)', PAGE):
        assert name in methods.names()
    for name in re.findall(r'--tasks "([a-z]+)', PAGE):
        assert name in tasks.NAMES
