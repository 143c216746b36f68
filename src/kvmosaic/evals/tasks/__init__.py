"""Generated tasks: one file each, and the folder is the registry.

`tasks/lines.py` defines `lines(rng, **options) -> Example`; its name in Python, on the command line and in a result table
comes from the file. Files whose name starts with an underscore are shared parts, not tasks.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Callable

from kvmosaic.evals.example import Example

NAMES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")))


def generator(name: str) -> Callable[..., Example]:
    """The generator of task `name`. Raises ValueError, with the nearest name, if there is none."""
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(NAMES)}."
        raise ValueError(f"no task {name!r}. {hint}")
    function: Callable[..., Example] = getattr(importlib.import_module(f"{__name__}.{name}"), name)
    return function
