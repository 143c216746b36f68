"""The papers: one file each, with a function of the file's name that returns a Recipe. The folder is the registry.

kvmosaic.methods.kivi(bits=2)                     in Python
kvmosaic.methods.parse("calibquant bits=1 | kivi bits=2")    as on the command line
"""

import difflib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from kvmosaic.options import option
from kvmosaic.recipe import Recipe

Method = Callable[..., Recipe]


def names() -> list[str]:
    """All methods, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


@functools.cache
def get(name: str) -> Method:
    """The method of that name. Raises ValueError with the nearest name if there is none."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), 1)
        hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(names())}"
        raise ValueError(f"no method {name!r}. {hint}")
    function: Method = getattr(importlib.import_module(f"{__name__}.{name}"), name)

    @functools.wraps(function)
    def named(*args: Any, **options: Any) -> Recipe:
        given = inspect.signature(function).bind(*args, **options).arguments
        label = " ".join(
            [name, *(f"{key}={value.name if isinstance(value, Recipe) else value}" for key, value in given.items())]
        )
        return replace(function(*args, **options), name=label)

    return named


def learner(name: str) -> Callable[..., dict[str, Tensor]] | None:
    """The function `learn(sample, *, options) -> tensors` of a method's file: what it learns of one layer. None if it does
    not learn layer by layer. Raises ValueError as `get` does."""
    get(name)
    return getattr(importlib.import_module(f"{__name__}.{name}"), "learn", None)


def __getattr__(name: str) -> Method:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; methods: {', '.join(names())}")


def parse(text: str) -> Recipe:
    """'calibquant bits=1 | kivi bits=2 residual=64' -> the joined recipe.

    Raises ValueError for an unknown method or option (with the nearest name) or a malformed one, RecipeConflict for
    methods that do not mix.
    """
    recipe: Recipe | None = None
    for part in text.split("|"):
        words = part.split()
        if not words:
            raise ValueError(f"a method is missing in {text!r}. Write for example 'calibquant bits=1 | kivi bits=2'")
        method = get(words[0])
        options = dict(option(words[0], inspect.signature(method).parameters, word) for word in words[1:])
        try:
            made = method(**options)
        except TypeError as error:  # a word where a number belongs
            raise ValueError(
                f"{part.strip()!r}: {error}. Options and their kinds: kvmosaic methods {words[0]}"
            ) from error
        recipe = made if recipe is None else recipe | made
    assert recipe is not None, "splitting gives at least one part"
    return recipe


for _name in names():
    globals()[_name] = get(_name)  # the function, where importing its file has left the module of that name
