import pytest


@pytest.fixture(autouse=True)
def _references(references: None) -> None:
    """The hooks are tested with one arithmetic; tests/contracts and tests/kernels hold the kernels to it."""
