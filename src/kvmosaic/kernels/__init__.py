"""Attention over stored bytes: one folder per kernel, the PyTorch reference beside its compiled forms."""

import torch

from kvmosaic.kernels import gpu, native


def status() -> dict[str, str]:
    """Which kernels serve on each kind of device, and why."""
    cpu = native.kernels()
    if torch.cuda.is_available():
        cuda = gpu.why_not(torch.device("cuda", 0)) or "compiled at first use for this GPU"
    else:
        cuda = "no GPU that torch can use"
    return {"cpu": f"{cpu.variant}: {cpu.why}", "cuda": cuda}
