"""CQ: what its tables promise of a model's cache."""

from pathlib import Path

import pytest
import torch

from kvmosaic import Cache, calibration, methods
from kvmosaic.errors import BadCalibration, NeedsCalibration
from kvmosaic.evals import learn as learning
from kvmosaic.learning import Sample, Side
from kvmosaic.methods.cq import learn
from tests import learned, models
from tests.models import Row, prompt

CQ = "cq coupled=4 bits=4"


def test_without_tables_it_says_how_to_learn_them() -> None:
    with pytest.raises(NeedsCalibration, match='kvmosaic calibrate --method "cq coupled=8 bits=10" --model NAME'):
        methods.cq(coupled=8, bits=10)


def test_tables_that_hold_every_vector_are_exact() -> None:
    """As many codes as tokens, and the cache holds what was learned from."""
    model, inputs = models.model("llama"), prompt("llama", Row(16, 0, 0))
    sample = learning.samples(learned.opened("llama"), [learned.passages("llama", 1, 16)[0]])
    tensors = {
        f"{layer}.{name}": each for layer in sample for name, each in learn(sample[layer], coupled=4, bits=4).items()
    }
    dense = {layer: torch.cat([sample[layer].keys.numbers, sample[layer].values.numbers]) for layer in sample}
    path = learned.folder() / "every"
    _save(model, tensors, path)
    cache = Cache(model, methods.cq(coupled=4, bits=4, calibration=path))
    model(**inputs, past_key_values=cache)
    for layer, right in dense.items():
        store = cache.layers[layer].stores["tier 0"]
        found = [lane.lane.codec.decode(lane.read(0, 16))[0] for lane in (store.keys, store.values)]
        assert torch.allclose(torch.cat(found), right, rtol=1e-3, atol=1e-3)


def test_bytes_are_the_formula() -> None:
    """2 H D b / (8 c) a token and layer, and 2 L H D 2**b numbers of float16, however many sequences there are."""
    model = models.model("llama")
    for rows in (1, 3):
        cache = Cache(model, methods.parse(learned.recipe("llama", CQ)))
        model(torch.randint(3, 150, (rows, 64)), past_key_values=cache)
        report = cache.report()
        assert report.codes == rows * 2 * 64 * 2 * 2 * 32 * 4 // (8 * 4)
        assert report.learned == 2 * 2 * 2 * 32 * 2**4 * 2
        assert report.exact == report.scales == 0


def test_weighing_by_fisher_costs_error_and_saves_what_the_loss_feels() -> None:
    draw = torch.Generator().manual_seed(0)
    numbers = torch.randn(1, 2000, 8, generator=draw)
    weights = torch.rand(1, 2000, 8, generator=draw) ** 8
    side = Side(numbers, weights)
    sample = Sample(side, side, None, torch.arange(2000))
    found = {}
    for fisher in (True, False):
        (table,) = learn(sample, coupled=4, bits=4, fisher=fisher)["keys"]
        distance = torch.cdist(numbers[0].unflatten(1, (2, 4)).transpose(0, 1), table.float()).amin(-1).square()
        found[fisher] = (
            float(distance.mean()),
            float((distance * weights[0].unflatten(1, (2, 4)).sum(-1).T).mean()),
        )
    assert found[True][0] > found[False][0]
    assert found[True][1] < found[False][1]


def _save(model: object, tensors: dict[str, torch.Tensor], path: Path, **options: object) -> None:
    from kvmosaic.hooks.models import fingerprint

    made = {"coupled": 4, "bits": 4, "pre_rope": False} | options
    calibration.Calibration("cq", made, fingerprint(model.config), "0", tensors).save(path)  # type: ignore[attr-defined]


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    file = learned.file("llama", CQ)
    with pytest.raises(BadCalibration, match="made with coupled=4, and coupled=8 was asked for"):
        methods.cq(coupled=8, bits=4, calibration=file)
    with pytest.raises(BadCalibration, match="no readable calibration file"):
        methods.cq(calibration=tmp_path / "none")
    for name, value in (("num_hidden_layers", 3), ("num_key_value_heads", 4)):
        other = models.make("llama")
        setattr(other.config, name, value)
        with pytest.raises(
            BadCalibration, match=r"calibrated for llama 2 layers, 4/2 heads .* and this model is llama"
        ):
            Cache(other, methods.cq(coupled=4, bits=4, calibration=file))
    tensors = calibration.load(file, method="cq", options={"coupled": 4, "bits": 4}).tensors
    _save(models.model("llama"), {name: each for name, each in tensors.items() if name[0] == "0"}, tmp_path / "one")
    with pytest.raises(BadCalibration, match="calibrated for 1 layers, and the model has more"):
        models.model("llama")(
            torch.ones(1, 9, dtype=torch.int64),
            past_key_values=Cache(models.model("llama"), methods.cq(coupled=4, bits=4, calibration=tmp_path / "one")),
        )
    _save(models.model("llama"), tensors | {"0.keys": tensors["0.keys"] * torch.nan}, tmp_path / "nan")
    with pytest.raises(BadCalibration, match=r"holds NaN or infinity, for example in 0\.keys"):
        methods.cq(coupled=4, bits=4, calibration=tmp_path / "nan")
