"""The file that methods learn into: what it is for is checked before it is used."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kvmosaic import calibration
from kvmosaic.calibration import Calibration, load
from kvmosaic.errors import BadCalibration

MADE = Calibration("cq", {"bits": 8}, "a model", "a digest", {"0.keys": torch.ones(3), "1.keys": torch.zeros(3)})


def test_what_was_written_is_read(tmp_path: Path) -> None:
    MADE.save(tmp_path / "file")
    found = load(tmp_path / "file", method="cq", options={"bits": 8})
    assert (found.method, found.options, found.fingerprint, found.data) == ("cq", {"bits": 8}, "a model", "a digest")
    assert {layer: each["keys"].tolist() for layer, each in found.by_layer().items()} == {0: [1] * 3, 1: [0] * 3}


def test_another_format_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "FORMAT", "0")
    MADE.save(tmp_path / "file")
    monkeypatch.undo()
    with pytest.raises(
        BadCalibration, match=r"has calibration format 0, and this version reads 1\. Make one with: kvmosaic"
    ):
        load(tmp_path / "file", method="cq", options={})


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (None, "has calibration format None"),
        ({"format": calibration.FORMAT}, "has calibration format 1"),
        ({"format": calibration.FORMAT, "method": "cq"}, r"has no whole header \('options'\)"),
        ({"format": calibration.FORMAT, "method": "cq", "options": "{"}, "has no whole header"),
        ({"format": calibration.FORMAT, "method": "cq", "options": "{}"}, r"has no whole header \('model'\)"),
    ],
)
def test_a_header_that_lacks_something_is_refused(tmp_path: Path, header: dict[str, str] | None, words: str) -> None:
    save_file({"0.keys": torch.ones(3)}, tmp_path / "file", metadata=header)
    with pytest.raises(BadCalibration, match=words):
        load(tmp_path / "file", method="cq", options={})


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_file_cut_short_is_refused(tmp_path: Path, share: float) -> None:
    MADE.save(tmp_path / "file")
    whole = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(BadCalibration, match="is no readable calibration file"):
        load(tmp_path / "file", method="cq", options={})


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "sprung",)  # type: ignore[return-value]

    torch.save({"0.keys": Trap()}, tmp_path / "file")
    with pytest.raises(BadCalibration, match="is no readable calibration file"):
        load(tmp_path / "file", method="cq", options={})
    assert not (tmp_path / "sprung").exists()
