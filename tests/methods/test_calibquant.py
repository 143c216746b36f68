"""CalibQuant by section 8 of its specification."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvmosaic import Cache, calibration, methods
from kvmosaic.calibration import Calibration
from kvmosaic.codecs import Uniform
from kvmosaic.errors import BadCalibration
from kvmosaic.hooks.models import fingerprint
from kvmosaic.kernels.attention import Affine
from kvmosaic.stores import PerLayer
from tests import models
from tests.models import generate, prompt


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_post_scaling_is_dequantize_then_attend(bits: int, groups: int) -> None:
    """Section 3.3, for 513 visual tokens: scales on the query and on the output, never on the codes."""
    codec = Uniform(bits=bits, axis="channel", clip=0.5 if bits == 1 else 1.0)
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, 2, 513, 64, generator=generator) * 2 + 1
    query = torch.randn(2, 2, groups, 64, generator=generator)
    packed = codec.encode(keys, None)
    scale, low, codes = (packed[name].double() for name in ("scale", "low", "codes"))
    by_hand = (query.double() * scale) @ codes.mT + (query.double() * low).sum(-1, keepdim=True)
    dense = query.double() @ (low + scale * codes).mT
    assert float((by_hand - dense).abs().max()) < 1e-10
    assert torch.allclose(codec.logits(query, packed).double(), dense, rtol=1e-5, atol=1e-4)
    weights = torch.randn(2, 2, groups, 513, generator=generator).softmax(-1) * 0.6  # text has the rest
    packed = codec.encode(values, None)
    scale, low, codes = (packed[name].double() for name in ("scale", "low", "codes"))
    by_hand = scale * (weights.double() @ codes) + low * weights.double().sum(-1, keepdim=True)
    dense = weights.double() @ (low + scale * codes)
    assert float((by_hand - dense).abs().max()) < 1e-10
    assert torch.allclose(codec.mix(weights, packed).double(), dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("clip", "error"), [(1.0, 8.0), (0.5, 1.35), (0.3, 0.44), (0.2, 0.37)])
@pytest.mark.parametrize("about", ["zero", "center"])
def test_error_of_one_bit_on_gaussian_channels(clip: float, error: float, about: str) -> None:
    codec = Uniform(bits=1, axis="channel", clip=clip, clip_about=about)  # type: ignore[arg-type]
    x = torch.randn(1, 8, 3328, 128, generator=torch.Generator().manual_seed(0))
    # the middle of the extremes of 3328 draws is off the mean by some tenths
    assert float((codec.decode(codec.encode(x, None)) - x).square().mean()) == pytest.approx(
        error, rel=0.04 if about == "zero" else 0.08
    )


@pytest.mark.parametrize(("bits", "error"), [(2, 0.35), (4, 0.014), (8, 4.8e-5)])
def test_error_of_more_bits_on_gaussian_channels(bits: int, error: float) -> None:
    codec = Uniform(bits=bits, axis="channel")
    x = torch.randn(1, 8, 512, 128, generator=torch.Generator().manual_seed(0))
    assert float((codec.decode(codec.encode(x, None)) - x).square().mean()) == pytest.approx(error, rel=0.04)


def test_shrinking_about_the_centre_keeps_the_levels_of_channels_far_from_zero() -> None:
    """N(5, 0.5): about zero every code is 1 and every number becomes 3.3; about the centre the mean stays."""
    x = torch.randn(1, 1, 3328, 64, generator=torch.Generator().manual_seed(0)) * 0.5 + 5
    zero, centre = (Uniform(bits=1, axis="channel", clip=0.5, clip_about=about) for about in ("zero", "center"))
    assert (zero.encode(x, None)["codes"] == 1).all()
    assert float(zero.decode(zero.encode(x, None)).mean()) == pytest.approx(3.4, abs=0.2)
    assert float(centre.decode(centre.encode(x, None)).mean()) == pytest.approx(5, abs=0.1)


logits = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40)


def mapped(affine: Affine, x: list[float], padding: int = 0) -> Tensor:
    row = torch.tensor([*x, *[1000.0] * padding]).view(1, 1, 1, -1)
    return affine.apply(row, torch.arange(len(x) + padding).view(1, 1, 1, -1) < len(x))[0, 0, 0]


@given(x=logits, low=st.floats(0, 3), high=st.floats(0, 3))
def test_the_map_of_the_logits(x: list[float], low: float, high: float) -> None:
    """Ends to ends where the range is wide enough; the order is kept always; padding has no say."""
    found = mapped(Affine(low, high), x)
    least, greatest = min(x), max(x)
    assert torch.allclose(mapped(Affine(low, high), x, padding=3)[: len(x)], found)
    order = torch.tensor(x).argsort()
    assert (found[order].diff() >= -1e-4).all()
    assert math.isclose(float(found.min()), least - low, abs_tol=1e-3)
    if greatest - least > 1.01 * abs(high - low) + 0.01:
        assert math.isclose(float(found.max()), greatest - high, abs_tol=1e-3)


@given(x=logits)
def test_without_offsets_the_map_is_the_identity(x: list[float]) -> None:
    assert torch.allclose(mapped(Affine(0, 0), x), torch.tensor(x), atol=1e-4)


def test_the_official_slope_may_turn_the_order_round() -> None:
    assert torch.allclose(mapped(Affine(official=True), [0.0, 1.0, 2.0]), torch.tensor([0.0, -0.5, -1.0]), atol=1e-5)
    assert (mapped(Affine(), [0.0, 1.0, 2.0]).diff() > 0).all()


def test_settings_are_the_released_ones() -> None:
    one, four = methods.calibquant(bits=1).visual, methods.calibquant(bits=4).visual
    assert (one.keys.codec.clip, one.values.codec.clip) == (0.5, 0.3)
    assert one.affine == Affine(0.0, 3.0)
    assert (four.keys.codec.clip, four.values.codec.clip, four.affine) == (1.0, 1.0, None)
    assert methods.calibquant(bits=2).visual.affine == Affine(0.0, 3.0)
    mixed = methods.calibquant(key_bits=2, value_bits=8).visual
    assert (mixed.keys.codec.bits, mixed.values.codec.bits) == (2, 8)


def test_bytes_are_the_formula() -> None:
    """2 H D b / 8 a visual token and 8 D H parameters a sequence, D = 64 and 256 tokens: whole blocks, no slack."""
    store = methods.calibquant(bits=1).visual.open(0, *torch.zeros(2, 1, 2, 0, 64))
    keys, values = torch.randn(2, 1, 2, 256, 64, generator=torch.Generator().manual_seed(0))
    store.put(keys, values, None)
    kinds = dict.fromkeys(("codes", "scales", "exact", "metadata"), 0)
    for _, kind, tensor in store.tensors():
        kinds[kind] += tensor.nbytes
    assert kinds["codes"] == 256 * 2 * 2 * 64 // 8
    assert kinds["scales"] == 8 * 64 * 2
    assert kinds["exact"] == 0


def test_two_valued_channels_are_exact_at_one_bit() -> None:
    codec = methods.calibquant(bits=1, key_clip=1.0).visual.keys.codec
    x = torch.where(torch.rand(1, 2, 63, 64, generator=torch.Generator().manual_seed(0)) < 0.5, -0.5, 1.25)
    assert torch.allclose(codec.decode(codec.encode(x, None)), x, atol=1e-3)


def learned(model: object, path: Path, **changes: object) -> Path:
    tensors = {
        name: torch.full((2,), value)
        for name, value in (("key_clip", 0.6), ("value_clip", 0.4), ("low", 0.0), ("high", 1.5))
    }
    options = {"key_bits": 1, "value_bits": 1, "clip_about": "center"}
    values = dict(
        method="calibquant", options=options, fingerprint=fingerprint(model.config), data="0", tensors=tensors
    )  # type: ignore[attr-defined]
    Calibration(**values | changes).save(path)  # type: ignore[arg-type]
    return path


def test_a_calibration_file_is_used(tmp_path: Path) -> None:
    model = models.model("internvl")
    recipe = methods.calibquant(bits=1, calibration=learned(model, tmp_path / "file"))
    assert isinstance(recipe.visual, PerLayer)
    tier = recipe.visual.tiers[1]
    assert tier.keys.codec.clip == pytest.approx(0.6)
    assert tier.keys.codec.clip_about == "center"
    assert tier.affine.high == 1.5
    cache = Cache(model, recipe)
    mine = generate(model, prompt("internvl", models.Row(75, 2, 3)), cache)
    assert cache.report().codes > 0
    same = methods.calibquant(bits=1, key_clip=0.6, value_clip=0.4, clip_about="center", high=1.5)
    assert torch.equal(mine, generate(model, prompt("internvl", models.Row(75, 2, 3)), Cache(model, same)))


def test_calibration_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model, path = models.model("internvl"), tmp_path / "file"
    with pytest.raises(BadCalibration, match=r"no readable calibration file .*kvmosaic calibrate --method calibquant"):
        methods.calibquant(calibration=path)
    learned(model, path)
    with pytest.raises(BadCalibration, match="made with key_bits=1, and key_bits=2 was asked for"):
        methods.calibquant(bits=2, calibration=path)
    with pytest.raises(BadCalibration, match=r"calibrated for internvl .* and this model is llava_next"):
        Cache(models.model("llava_next"), methods.calibquant(bits=1, calibration=path))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(BadCalibration, match="no readable calibration file"):
        methods.calibquant(calibration=path)
    learned(model, path, method="cq")
    with pytest.raises(BadCalibration, match="made for cq, and calibquant was asked for"):
        methods.calibquant(calibration=path)


def test_no_room_for_a_calibration_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = learned(models.model("internvl"), tmp_path / "file")
    before = path.read_bytes()

    def full(tensors: object, file: Path, metadata: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(calibration, "save_file", full)
    with pytest.raises(OSError, match=r"cannot write .*file: .*No space left on device"):
        learned(models.model("internvl"), path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
