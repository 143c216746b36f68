"""Options as they are written on the command line: `name=value` words after the name of a method or a task."""

import ast
import difflib
from collections.abc import Iterable
from typing import Any


def option(name: str, known: Iterable[str], word: str) -> tuple[str, Any]:
    """'bits=2' -> ("bits", 2), for `name`, which has the `known` options.

    Raises ValueError for an unknown option (with the nearest) or one without a value.
    """
    known = list(known)
    key, equals, value = word.partition("=")
    if not equals:
        raise ValueError(f"an option of {name} is written option=value, got {word!r}. Options: {', '.join(known)}")
    if key not in known:
        near = difflib.get_close_matches(key, known, 1)
        hint = f"Did you mean {near[0]!r}?" if near else f"It has: {', '.join(known)}"
        raise ValueError(f"{name} has no option {key!r}. {hint}")
    try:
        return key, ast.literal_eval(value.capitalize() if value in ("true", "false", "none") else value)
    except (SyntaxError, ValueError):
        return key, value  # a word or a path
