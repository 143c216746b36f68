"""One file format for what methods learn: a safetensors file whose header says of what, for what and from what."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
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

    def holding(self, tensors: dict[str, Tensor]) -> Calibration:
        return replace(self, tensors=tensors)

    def done_before(self, path: Path) -> dict[str, Tensor]:
        """The tensors of a file that a run like this one, broken off, left at `path`; none if it was another run."""
        try:
            found = load(path, method=self.method, options=self.options)
        except BadCalibration:
            return {}
        return found.tensors if replace(found, tensors={}) == replace(self, tensors={}) else {}

    def by_layer(self) -> dict[int, dict[str, Tensor]]:
        """The tensors "LAYER.NAME" by layer and name. Raises BadCalibration if the layers differ in what they have."""
        found: dict[int, dict[str, Tensor]] = {}
        for key, tensor in self.tensors.items():
            layer, _, name = key.partition(".")
            if not layer.isdecimal():
                raise BadCalibration(f"a calibration of {self.method} has a tensor {key!r}, which belongs to no layer")
            found.setdefault(int(layer), {})[name] = tensor
        shapes = {tuple(sorted((name, tuple(each.shape)) for name, each in layer.items())) for layer in found.values()}
        if len(shapes) != 1:
            raise BadCalibration(f"the layers of a calibration of {self.method} are not alike. Make it again")
        return found


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
    try:
        made: dict[str, Any] = json.loads(header["options"])
        found = Calibration(method, made, header["model"], header["data"], tensors)
    except (KeyError, ValueError) as error:
        raise BadCalibration(f"{path} has no whole header ({error}). {again}") from error
    for name, value in options.items():
        if made.get(name) != value:
            raise BadCalibration(
                f"{path} was made with {name}={made.get(name)}, and {name}={value} was asked for. {again}"
            )
    damaged = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if damaged:
        raise BadCalibration(f"{path} holds NaN or infinity, for example in {damaged[0]}. {again}")
    return found
