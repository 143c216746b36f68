"""How many tokens a selection keeps, and which of them whatever happens."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from kvmosaic.selection.base import Step

Made = TypeVar("Made")


@dataclass(frozen=True)
class Protect:
    """Tokens of prompts that are never dropped: the `first` ones of a sequence (sinks, a system prompt), those of pictures
    (`visual`), or all others (`text`). Generated tokens are not protected."""

    first: int = 0
    visual: bool = False
    text: bool = False

    def __post_init__(self) -> None:
        if self.first < 0:
            raise ValueError(f"protect is a count of first tokens, at least 0, got {self.first}")
        if self.visual and self.text:
            raise ValueError("protect=visual+text leaves nothing that may be dropped. Protect one of the two")

    @staticmethod
    def read(text: "Protect | int | str | None") -> "Protect":
        """As a method's option has it: 4, "visual", "text", or several joined with + ("4+visual")."""
        if isinstance(text, Protect):
            return text
        words = [] if text is None else str(text).split("+")
        counts = [word for word in words if word.strip().lstrip("-").isdigit()]
        kinds = [word.strip() for word in words if word not in counts]
        if len(counts) > 1 or len(set(kinds)) < len(kinds) or not {"visual", "text"}.issuperset(kinds):
            raise ValueError(
                f"protect is a count of first tokens, visual, text, or a count and one of them as 4+visual, got {text!r}"
            )
        return Protect(int(counts[0]) if counts else 0, "visual" in kinds, "text" in kinds)

    @property
    def by_kind(self) -> bool:
        """It must be known which tokens are visual."""
        return self.visual or self.text

    def among(self, step: Step) -> Tensor:
        """[B, T] bool: which of a prompt's tokens are protected."""
        found = step.place < self.first
        if self.by_kind:
            found = found | (step.visual if self.visual else ~step.visual)
        return found & step.valid


UNPROTECTED = Protect()


@dataclass(frozen=True)
class Budget:
    """How many tokens of a prompt stay in each KV head: a share of them (`keep`), a count (`tokens`), or as many as a cache
    of so many `gigabytes` (10^9 bytes, of all layers and sequences, right after the first prompt) can hold; one of the three.
    Later turns have budgets of their own, and so have chunks of a prompt, unless the cache takes it whole or prunes it as it comes
    (`Cache(whole_prompt=True)`, `Cache(pruned_prompt=True)`).

    Raises ValueError if several or none is given, for a share outside (0, 1], a count below 1, or a size not above 0.
    """

    keep: float | None = None
    tokens: int | None = None
    gigabytes: float | None = None
    protect: Protect = UNPROTECTED

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("keep", "tokens", "gigabytes")}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) != 1:
            told = " and ".join(f"{name}={value}" for name, value in given.items()) or "none"
            raise ValueError(f"give a budget as keep= (a share), tokens= (a count) or gigabytes=, got {told}")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(f"keep is the share of tokens that stays, above 0 and at most 1, got {self.keep}")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens is how many stay in each head, at least 1, got {self.tokens}")
        if self.gigabytes is not None and not self.gigabytes > 0:
            raise ValueError(f"gigabytes is the size of the whole cache in 10^9 bytes, above 0, got {self.gigabytes}")
        if self.tokens is not None and self.tokens < self.protect.first:
            raise ValueError(
                f"a budget of {self.tokens} tokens cannot hold the {self.protect.first} first tokens that are protected. "
                "Raise tokens= or protect fewer"
            )

    def count(self, present: Tensor) -> Tensor:
        """present [...] int64, tokens of a prompt -> how many stay, never more than there are, never fewer than one."""
        if self.tokens is not None:
            return present.clamp_max(self.tokens)
        assert self.keep is not None, "a size is resolved to a count before a token comes"
        return (present * self.keep).round().to(present.dtype).clamp_min(1).minimum(present)

    def __str__(self) -> str:
        given = ((name, getattr(self, name)) for name in ("keep", "tokens", "gigabytes"))
        return next(f"{name}={value}" for name, value in given if value is not None)


OPTIONS = """keep: share of the prompt's tokens that stays in each KV head, in the mean where layers or heads differ ({default} if no
    budget is given).
tokens: how many stay of each prompt, instead.
gigabytes: as many as a cache of that size (10^9 bytes) holds right after the first prompt, instead.
protect: prompt tokens that are never dropped: a count of the first ones, visual, text, or both as 4+visual.
"""


def budgeted(
    keep: float | None = None, tokens: int | None = None
) -> Callable[[Callable[..., Made]], Callable[..., Made]]:
    """For a method whose first parameter is a Budget: it is asked for as keep=, tokens=, gigabytes= and protect=, and
    without one has the budget given here."""
    default = Budget(keep, tokens)

    def decorate(method: Callable[..., Made]) -> Callable[..., Made]:
        @functools.wraps(method)
        def asked(
            keep: float | None = None,
            *,
            tokens: int | None = None,
            gigabytes: float | None = None,
            protect: Protect | int | str | None = None,
            **options: Any,
        ) -> Made:
            if keep is None and tokens is None and gigabytes is None:
                keep, tokens = default.keep, default.tokens
            return method(Budget(keep, tokens, gigabytes, Protect.read(protect)), **options)

        signature = inspect.signature(method)
        *given, _ = inspect.signature(asked, follow_wrapped=False).parameters.values()
        _, *own = signature.parameters.values()
        asked.__signature__ = signature.replace(parameters=[*given, *own])  # type: ignore[attr-defined]
        asked.__doc__ = OPTIONS.format(default=default) + (inspect.getdoc(method) or "")
        return asked

    return decorate
