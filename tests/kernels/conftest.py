"""Every compiled variant that this CPU can run, forced one after the other; and a GPU, real or emulated."""

from collections.abc import Iterator

import pytest
import torch

from kvmosaic.kernels import native
from tests.kernels.emulated import emulate, emulator

__all__ = ["emulator"]


@pytest.fixture(params=native.runnable())
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("KVMOSAIC_CPU", request.param)
    native.kernels.cache_clear()
    yield request.param
    native.kernels.cache_clear()


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def gpu_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the CUDA kernels run: on a GPU if there is one, and emulated on the CPU."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")
        return torch.device("cuda")
    emulate(request.getfixturevalue("emulator"), monkeypatch)
    return torch.device("cpu")
