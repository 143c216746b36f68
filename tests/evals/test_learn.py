"""What a method is shown of a model, and the file that it leaves: whole, resumable, and of one model and text."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvmosaic import calibration, methods
from kvmosaic.errors import BadCalibration, NotFinite
from kvmosaic.evals import learn as learning
from kvmosaic.evals.learn import Passage
from kvmosaic.learning import Sample, Side
from kvmosaic.loading import open_model
from tests import learned, models
from tests.models import Row, prompt

KINDS = ["llama", "phi3", "gemma3_text", "qwen2_5_vl", "qwen3_vl"]
"""Plain keys, fused projections, two rotary tables, three ids a token in two forms."""


@pytest.mark.parametrize("kind", KINDS)
def test_keys_are_those_of_the_cache_and_of_the_projection(kind: str) -> None:
    """Rotated as transformers caches them; unrotated as the layer had them before its rotary positions."""
    model = models.model(kind)
    (part,) = learned.passages(kind, 1)
    found = learning.samples(learned.opened(kind), [part])
    cache, before = DynamicCache(config=model.config.get_text_config(decoder=True)), {}
    hooks = [
        (
            attention.k_norm
            if hasattr(attention, "k_norm")
            else attention.qkv_proj
            if kind == "phi3"
            else attention.k_proj
        ).register_forward_hook(lambda module, args, out, index=index: before.setdefault(index, out))
        for index, attention in enumerate(layer.self_attn for layer in model.get_decoder().layers)
    ]
    model(**part.inputs, past_key_values=cache)
    for hook in hooks:
        hook.remove()
    assert list(found) == ([1, 2] if kind == "gemma3_text" else [0, 1])
    for layer, sample in found.items():
        assert torch.allclose(sample.keys.numbers, cache.layers[layer].keys[0], atol=1e-5)
        assert torch.allclose(sample.values.numbers, cache.layers[layer].values[0], atol=1e-5)
        keys = before[layer][0]
        keys = keys[:, 128:192] if kind == "phi3" else keys
        if keys.shape[0] != 2:  # [tokens, heads * channels] or [tokens, heads, channels]
            keys = keys.reshape(len(sample), 2, 32).transpose(0, 1)
        assert torch.allclose(sample.unrotated.numbers, keys, atol=1e-4)


def test_weights_are_squared_gradients_of_the_loss() -> None:
    """Against moved numbers: the loss with one value changed by a little, through a hook on the projection."""
    model = models.make("llama").double()
    ids = prompt("llama", Row(20, 0, 0))["input_ids"]
    counted = torch.arange(20)[None] >= 12
    opened = learned.Opened("llama", model, None)
    sample = learning.samples(opened, [Passage({"input_ids": ids}, counted)])[0]

    def loss(name: str, token: int, channel: int, by: float) -> float:
        def move(module: object, args: object, out: Tensor) -> Tensor:
            out = out.clone()
            out[0, token, channel] += by
            return out

        hook = model.get_submodule(f"model.layers.0.self_attn.{name}").register_forward_hook(move)
        logits = model(ids).logits[0, :-1]
        hook.remove()
        each = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        return float(each[counted[0, 1:]].sum())

    for name, side in (("v_proj", sample.values), ("k_proj", sample.unrotated)):
        for token, channel in ((3, 5), (15, 40)):
            slope = (loss(name, token, channel, 1e-2) - loss(name, token, channel, -1e-2)) / 2e-2
            assert float(side.weights[channel // 32, token, channel % 32]) == pytest.approx(
                slope**2, rel=2e-2
            )  # norms are in float32 inside


def test_learning_leaves_the_model_as_it_was() -> None:
    model = models.make("llama")
    weight = next(model.parameters())
    weight.requires_grad_(True)
    learning.samples(learned.Opened("llama", model, None), learned.passages("llama", 1))
    assert weight.requires_grad and weight.grad is None
    assert not list(model.get_input_embeddings()._forward_hooks)
    assert not list(model.model.rotary_emb._forward_pre_hooks)


CQ = "cq coupled=4 bits=4"
NAME, OPTIONS = learning.settings(CQ)


def broken_off(monkeypatch: pytest.MonkeyPatch, out: Path) -> list[int]:
    """A run that ends while it learns the second layer. Returns the tokens of each call, of later runs too."""
    calls: list[int] = []
    own = methods.learner(NAME)

    def learn(sample: Sample, **options: object) -> dict[str, Tensor]:
        calls.append(len(sample))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return own(sample, **options)

    monkeypatch.setattr(methods, "learner", lambda name: learn)
    with pytest.raises(KeyboardInterrupt):
        learning.learn(learned.opened("llama"), NAME, OPTIONS, learned.passages("llama"), out)
    assert [each.name for each in out.parent.iterdir()] == [f"{out.name}.layers"]
    return calls


def test_a_run_that_was_broken_off_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = calibration.load(learned.file("llama", CQ), method=NAME, options=OPTIONS)
    opened, parts, out = learned.opened("llama"), learned.passages("llama"), tmp_path / "file"
    calls = broken_off(monkeypatch, out)
    found, before = learning.learn(opened, NAME, OPTIONS, parts, out)
    assert before == {0}
    assert calls == [180] * 3
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert found.tensors.keys() == right.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in right.tensors.items())


@pytest.mark.parametrize("other", ["text", "options", "damage"])
def test_a_run_does_not_go_on_from_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    opened, parts, out = learned.opened("llama"), learned.passages("llama"), tmp_path / "file"
    calls = broken_off(monkeypatch, out)
    if other == "damage":
        (tmp_path / "file.layers").write_bytes(b"half")
    parts = learned.passages("llama", 2) if other == "text" else parts
    options = OPTIONS | {"bits": 3} if other == "options" else OPTIONS
    _, before = learning.learn(opened, NAME, options, parts, out)
    assert before == set()
    assert len(calls) == 4


def test_numbers_that_are_none_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.make("llama")
    model.model.layers[1].self_attn.v_proj.weight.data[3] = torch.nan
    with pytest.raises(NotFinite, match="the loss on the data is nan"):
        learning.learn(
            learned.Opened("llama", model, None), NAME, OPTIONS, learned.passages("llama"), tmp_path / "file"
        )
    monkeypatch.setattr(learning.Rotary, "transpose", lambda self, gradient, position: gradient * torch.inf)
    with pytest.raises(NotFinite, match="layer 0: the keys, the values or their gradients hold NaN or infinity"):
        learning.samples(learned.opened("llama"), learned.passages("llama", 1))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(NotFinite, match="hold NaN or infinity"):
        Side(torch.zeros(2, 3, 4), torch.full((2, 3, 4), torch.inf))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 8}, "codes of 8 bits need 256 tokens at least .*, got 180. Give more --sequences"),
        ({"coupled": 5}, "coupled must divide the head size 32, got 5"),
        ({"bits": 17}, "bits of a code are 1 to 16, got 17"),
    ],
)
def test_what_cannot_be_learned_is_refused_and_leaves_nothing(
    tmp_path: Path, options: dict[str, int], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        learning.learn(learned.opened("llama"), NAME, OPTIONS | options, learned.passages("llama"), tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_passages_of_a_text_are_of_the_length_that_was_asked_for(tmp_path: Path) -> None:
    opened, text = open_model("mosaic-lm"), tmp_path / "text"
    text.write_text("The quick brown fox. " * 50)
    parts = learning.passages(opened, str(text), 4, 32)
    assert {tuple(part.inputs["input_ids"].shape) for part in parts} == {(1, 32)}
    assert all(bool(part.counted.all()) for part in parts)
    assert learning.digest(parts) == learning.digest(learning.passages(opened, str(text), 4, 32))
    assert learning.digest(parts) != learning.digest(learning.passages(opened, str(text), 4, 32, seed=1))
    (whole,) = learning.passages(opened, str(text), 4, 10_000)
    assert whole.inputs["input_ids"].shape[1] == opened.inputs(text.read_text())["input_ids"].shape[1]
    text.write_text("")
    with pytest.raises(ValueError, match="nothing can be learned from fewer than 2"):
        learning.passages(opened, str(text), 4, 32)
    text.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot read the text"):
        learning.passages(opened, str(text), 4, 32)


def test_of_a_task_the_answers_count() -> None:
    opened = open_model("mosaic-lm")
    (part,) = learning.passages(opened, "lines lines=6 questions=2", 1, 2048)
    ids = part.inputs["input_ids"]
    assert opened.tokenizer.decode(ids[0]).startswith("<s>Records.\nline ")
    answers = opened.tokenizer.decode(ids[part.counted]).split()
    assert len(answers) == 2 and all(each.isdigit() and len(each) == 5 for each in answers)


@pytest.mark.parametrize("kind", ["internvl", "qwen2_5_vl"])
def test_pictures_are_learned_from_too(kind: str) -> None:
    found = learning.samples(learned.opened(kind), learned.passages(kind, 2))
    tokens = sum(part.counted.shape[1] for part in learned.passages(kind, 2))
    assert {len(sample) for sample in found.values()} == {tokens}


def test_the_first_tokens_of_each_sequence_can_be_left_out() -> None:
    sample = learning.samples(learned.opened("llama"), learned.passages("llama"))[0]
    rest = sample.after(4)
    assert len(rest) == len(sample) - 3 * 4
    assert int(rest.place.min()) == 4
    assert torch.equal(rest.keys.numbers[:, :56], sample.keys.numbers[:, 4:60])


def test_layers_that_are_not_alike_are_refused(tmp_path: Path) -> None:
    whole = calibration.load(learned.file("llama", CQ), method=NAME, options=OPTIONS)
    for tensors, words in (
        ({name: each for name, each in whole.tensors.items() if name != "1.keys"}, "are not alike"),
        (whole.tensors | {"extra": torch.zeros(1)}, "'extra', which belongs to no layer"),
        ({}, "are not alike"),
    ):
        whole.holding(tensors).save(tmp_path / "file")
        with pytest.raises(BadCalibration, match=words):
            methods.cq(coupled=4, bits=4, calibration=tmp_path / "file")
