"""One file format for what methods learn: a safetensors file whose header says of what, for what and from what."""

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvmosaic.errors import BadCalibration

FORMAT = "1"


@dataclass(frozen=True)
class Calibration:
    """What one method learned for one model.

    fingerprint: of the model (`hooks.models.fingerprint`). data: what it was learned from, as a digest.
    """

    method: str
    options: dict[str, Any]
    fingerprint: str
    data: str
    tensors: dict[str, Tensor]

    def save(self, path: str | Path) -> None:
        """Write the file whole or not at all. Raises OSError, with nothing left behind, if there is no room."""
        path = Path(path)
        header = {
            "format": FORMAT,
            "method": self.method,
            "options": json.dumps(self.options, sort_keys=True),
            "model": self.fingerprint,
            "data": self.data,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        part = path.with_name(path.name + ".part")
        try:
            save_file(self.tensors, part, metadata=header)
            os.replace(part, path)
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise OSError(f"cannot write {path}: {error}") from error


def load(path: str | Path, *, method: str, options: dict[str, Any]) -> Calibration:
    """Read a calibration of `method`. Raises BadCalibration if the file is missing, damaged, of another method or
    format, or was made with other values of `options`."""
    again = f"Make one with: kvmosaic calibrate --method {method} --model NAME --out {path}"
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise BadCalibration(f"{path} is no readable calibration file ({error}). {again}") from error
    if header.get("format") != FORMAT or "method" not in header:
        raise BadCalibration(
            f"{path} has calibration format {header.get('format')}, and this version reads {FORMAT}. {again}"
        )
    if header["method"] != method:
        raise BadCalibration(f"{path} was made for {header['method']}, and {method} was asked for. {again}")
    made: dict[str, Any] = json.loads(header["options"])
    for name, value in options.items():
        if made.get(name) != value:
            raise BadCalibration(
                f"{path} was made with {name}={made.get(name)}, and {name}={value} was asked for. {again}"
            )
    return Calibration(method, made, header["model"], header["data"], tensors)
