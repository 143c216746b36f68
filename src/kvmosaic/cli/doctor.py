"""kvmosaic doctor"""

import os
import platform
from importlib import metadata
from typing import Any

import torch

import kvmosaic
from kvmosaic import kernels
from kvmosaic.cli.output import Json, show


def doctor(json_file: Json = None) -> None:
    """Versions, devices, and which kernel serves and why."""
    rows = [{"what": "kvmosaic", "state": kvmosaic.__version__}, {"what": "python", "state": platform.python_version()}]
    rows += [{"what": name, "state": metadata.version(name)} for name in ("torch", "transformers", "safetensors")]
    rows.append(
        {"what": "cpu", "state": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"}
    )
    rows.append({"what": "gpu", "state": _gpu()})
    rows += _kernels()
    show(rows, "doctor", json_file)


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def _kernels() -> list[dict[str, Any]]:
    return [{"what": f"kernels on {device}", "state": state} for device, state in kernels.status().items()]
