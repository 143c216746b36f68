"""Attention over stored bytes: one folder per kernel, the PyTorch reference beside its compiled forms."""

from kvmosaic.kernels import native


def status() -> dict[str, str]:
    """Which kernels serve on each kind of device, and why."""
    cpu = native.kernels()
    return {"cpu": f"{cpu.variant}: {cpu.why}"}
