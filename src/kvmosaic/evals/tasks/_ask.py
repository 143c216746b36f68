"""The two ways in which tasks over several pictures ask: by number for a content, or by content for a number."""

from typing import Literal

Ask = Literal["read", "which"]


def check_ask(ask: Ask) -> Ask:
    """Raises ValueError unless `ask` is one of the two."""
    if ask not in ("read", "which"):
        raise ValueError(f"ask must be 'read' or 'which', got {ask!r}.")
    return ask
