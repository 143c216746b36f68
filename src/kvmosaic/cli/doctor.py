"""kvmosaic doctor"""

import os
import platform
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import kvmosaic
from kvmosaic import kernels, methods
from kvmosaic.calibration import Calibration
from kvmosaic.cli.output import Json, show
from kvmosaic.errors import NeedsCalibration
from kvmosaic.evals import learn
from kvmosaic.hooks import pinned
from kvmosaic.kernels.attention import cpu
from kvmosaic.learning import Sample, Side
from kvmosaic.projection import NO_KERNEL
from kvmosaic.recipe import Recipe

HEAD_SIZE = 128
"""Of most models; what serves can depend on it."""

TOKENS = 300
"""To learn from: more than there are codes, by default."""


def doctor(json_file: Json = None) -> None:
    """Versions, devices, and which kernel serves and why."""
    rows = [{"what": "kvmosaic", "state": kvmosaic.__version__}, {"what": "python", "state": platform.python_version()}]
    rows += [{"what": name, "state": metadata.version(name)} for name in ("torch", "transformers", "safetensors")]
    rows.append(
        {"what": "cpu", "state": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"}
    )
    rows.append({"what": "gpu", "state": _gpu()})
    rows += _kernels()
    rows += [{"what": f"method {name}", "state": _served(name)} for name in methods.names()]
    show(rows, "doctor", json_file)


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def _kernels() -> list[dict[str, Any]]:
    return [{"what": f"kernels on {device}", "state": state} for device, state in kernels.status().items()]


def _served(name: str) -> str:
    """Which kernels serve a method as it is by default, for heads of 128 channels in bfloat16."""
    try:
        recipe = methods.get(name)() if methods.learner(name) is None else _learned(name)
    except NeedsCalibration:
        return "as its scorer and its tiers: it needs a file first"
    captured = pinned.why_not(recipe, 0, HEAD_SIZE, torch.bfloat16, device=None)
    return f"CPU {_compiled(recipe)}; captured on a GPU: {captured or 'yes'}"


def _learned(name: str) -> Recipe:
    """A method with what it learns of random numbers: which kernels serve does not depend on them."""
    _, options = learn.settings(name)
    learner = methods.learner(name)
    assert learner is not None, "the caller asks"
    numbers = torch.randn(1, TOKENS, HEAD_SIZE, generator=torch.Generator().manual_seed(0))
    side = Side(numbers, torch.ones_like(numbers))
    tensors = learner(Sample(side, side, side, torch.arange(TOKENS)), **options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.safetensors"
        made = {f"0.{key}": tensor.contiguous() for key, tensor in tensors.items()}
        Calibration(name, options, "", "", made).save(path)
        return methods.get(name)(calibration=path)


def _compiled(recipe: Recipe) -> str:
    if recipe.projection is not None:
        return f"PyTorch ({NO_KERNEL})"
    tiers = [*recipe.stored_in, *([recipe.visual] if recipe.visual else [])]
    reasons = [
        cpu.why_not(lane.codec, role, HEAD_SIZE)  # type: ignore[arg-type]
        for tier in tiers
        for lane, role in zip(tier.lanes(0), ("keys", "values"), strict=True)
    ]
    return next((f"PyTorch ({reason})" for reason in reasons if reason), "compiled")
