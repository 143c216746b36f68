"""Every compiled variant that this CPU can run, forced one after the other."""

from collections.abc import Iterator

import pytest

from kvmosaic.kernels import native


@pytest.fixture(params=native.runnable())
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("KVMOSAIC_CPU", request.param)
    native.kernels.cache_clear()
    yield request.param
    native.kernels.cache_clear()
