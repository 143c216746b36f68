"""The cache as transformers keeps it: the rival in every table."""

from kvmosaic.recipe import Recipe


def exact() -> Recipe:
    """Nothing is compressed."""
    return Recipe()
