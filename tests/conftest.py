"""One thread a test process (products this small only wait for one another), and the same examples everywhere."""

import hypothesis
import pytest
import torch

from kvmosaic.kernels import native
from tests.kernels.emulated import emulate, emulator

__all__ = ["emulator"]

torch.set_num_threads(1)
hypothesis.settings.register_profile("same", derandomize=True, deadline=None, max_examples=25, database=None)
hypothesis.settings.load_profile("same")


@pytest.fixture
def references(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch in place of the compiled kernels: a rounding that differs by 1e-5 can flip a code many tokens later."""
    found = native.Kernels(None, "reference", "a test asks for it")
    monkeypatch.setattr(native, "kernels", lambda: found)


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def gpu_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the CUDA kernels run: on a GPU if there is one, and emulated on the CPU."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")
        return torch.device("cuda")
    emulate(request.getfixturevalue("emulator"), monkeypatch)
    return torch.device("cpu")
