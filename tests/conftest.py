"""One thread a test process (products this small only wait for one another), and the same examples everywhere."""

import hypothesis
import pytest
import torch

from kvmosaic.kernels import native

torch.set_num_threads(1)
hypothesis.settings.register_profile("same", derandomize=True, deadline=None, max_examples=25, database=None)
hypothesis.settings.load_profile("same")


@pytest.fixture
def references(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch in place of the compiled kernels: a rounding that differs by 1e-5 can flip a code many tokens later."""
    found = native.Kernels(None, "reference", "a test asks for it")
    monkeypatch.setattr(native, "kernels", lambda: found)
