"""Every supported family, with the exact tier, KIVI and CalibQuant, beside the untouched model."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import kvmosaic
from kvmosaic import Cache, Recipe, methods
from tests import models, reference
from tests.instances import EXACT
from tests.models import KINDS, VISUAL, Row, generate, logits, prompt

every_kind = pytest.mark.parametrize("kind", KINDS)
every_visual = pytest.mark.parametrize("kind", VISUAL)
PADDED = (Row(45, 1, 0), Row(33, 2, 1))
NEAR = dict(rtol=0, atol=2e-3)
"""Logits have a spread of 1, and 2 bits change them by 2 to 5. Rounding at 1e-5 may flip a code, which shows at 1e-4."""


def stock(kind: str) -> tuple[Any, DynamicCache]:
    model = models.stock(kind)
    return model, DynamicCache(config=model.config.get_text_config(decoder=True))


@every_kind
@pytest.mark.parametrize("rows", [(Row(),), PADDED], ids=["one", "padded"])
def test_exact_tiers_change_nothing(kind: str, rows: tuple[Row, ...]) -> None:
    model, inputs = models.model(kind), prompt(kind, *rows)
    mine, right = (
        logits(model, inputs, Cache(model, Recipe(tiers=(EXACT,)))),
        logits(stock(kind)[0], inputs, stock(kind)[1]),
    )
    assert torch.allclose(mine, right, **NEAR)
    assert torch.equal(mine.argmax(-1), right.argmax(-1))


@every_kind
def test_kivi_is_quantize_then_attend(kind: str) -> None:
    """Against a dense cache of the paper's words, over several flushes of the keys."""
    model, inputs = models.model(kind), prompt(kind, Row(75, 1, 3))
    mine = logits(model, inputs, Cache(model, methods.kivi(bits=2, residual=32)), 45)
    right = logits(models.stock(kind), inputs, reference.cache(models.stock(kind), reference.kivi(2, residual=32)), 45)
    assert torch.allclose(mine, right, **NEAR)


@every_visual
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_calibquant_is_quantize_then_attend(kind: str, bits: int) -> None:
    model, inputs = models.model(kind), prompt(kind, Row(31, 2, 4))
    recipe = methods.calibquant(bits=bits, key_clip=1.0, value_clip=1.0, calibrated=False)
    mine = logits(model, inputs, Cache(model, recipe), 10)
    lossy = reference.calibquant(bits, inputs["input_ids"][0] == models.IMAGE)
    right = logits(models.stock(kind), inputs, reference.cache(models.stock(kind), lossy), 10)
    assert torch.allclose(mine, right, **NEAR)


@every_kind
def test_the_first_token_is_that_of_the_uncompressed_model(kind: str) -> None:
    model, inputs = models.model(kind), prompt(kind, *PADDED)
    right = logits(stock(kind)[0], inputs, stock(kind)[1], 2)
    for text in ["kivi bits=1 residual=32", *["calibquant bits=1"] * (kind in VISUAL)]:
        mine = logits(model, inputs, Cache(model, methods.parse(text)), 2)
        assert torch.allclose(mine[0], right[0], **NEAR)
        assert not torch.allclose(mine[1], right[1], atol=1e-2), "compression must show in the second"


@every_kind
def test_a_left_padded_row_is_that_row_alone(kind: str) -> None:
    """Padding is never attended, and enters no range."""
    model, together = models.model(kind), prompt(kind, *PADDED)
    for text in [
        "kivi bits=2 residual=32",
        *["calibquant bits=1", "calibquant bits=2 by_picture=true | kivi residual=32"] * (kind in VISUAL),
    ]:
        recipe = methods.parse(text)
        both = logits(model, together, Cache(model, recipe))
        for index, row in enumerate(PADDED):
            alone = logits(model, prompt(kind, row), Cache(model, recipe))
            assert torch.allclose(both[:, index], alone[:, 0], **NEAR), (text, index)


@every_kind
def test_without_a_visual_token_calibquant_changes_nothing(kind: str) -> None:
    if kind not in VISUAL:
        pytest.skip("takes no pictures")
    model, inputs = models.model(kind), prompt(kind, Row(45, 0, 0))
    cache = Cache(model, methods.calibquant(bits=1))
    assert torch.equal(generate(model, inputs, cache), generate(stock(kind)[0], inputs, stock(kind)[1]))
    assert cache.report().codes == 0


@every_visual
def test_the_vision_tower_keeps_its_own_attention(kind: str) -> None:
    model = models.make(kind)
    towers = {name: getattr(model.config, name) for name in model.config.sub_configs}
    before = {name: each._attn_implementation for name, each in towers.items()}
    kvmosaic.attach(model, methods.calibquant())
    key = "text_config"
    assert towers[key]._attn_implementation == "kvmosaic"
    assert {name: each._attn_implementation for name, each in towers.items() if name != key} == {
        name: each for name, each in before.items() if name != key
    }
    kvmosaic.detach(model)
    assert {name: each._attn_implementation for name, each in towers.items()} == before


@every_visual
def test_rows_may_differ_in_visual_length(kind: str) -> None:
    """One row with none at all (where the family lets a batch have one)."""
    rows = (Row(45, 2, 0), Row(40, 0 if kind == "internvl" else 1, 1), Row(38, 1, 2))
    model, inputs = models.model(kind), prompt(kind, *rows)
    recipe = methods.calibquant(bits=1, clip_about="center")
    both = logits(model, inputs, Cache(model, recipe))
    for index, row in enumerate(rows):
        alone = logits(model, prompt(kind, row), Cache(model, recipe))
        assert torch.allclose(both[:, index], alone[:, 0], **NEAR), index


def test_softcaps_and_sinks_are_in_these_models_at_work() -> None:
    """The stand-ins are eager attention's, and without cap or sinks the answer differs."""
    model, inputs = models.make("gemma2"), prompt("gemma2")
    right = logits(*([models.stock("gemma2"), inputs, stock("gemma2")[1], 5]))
    assert models.stock("gemma2").config._attn_implementation == "eager"
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    model.config.attn_logit_softcapping = None
    assert not torch.allclose(logits(model, inputs, None, 5), right, atol=1e-2)
    model, inputs = models.make("gpt_oss"), prompt("gpt_oss")
    right = logits(models.stock("gpt_oss"), inputs, stock("gpt_oss")[1], 5)
    for layer in model.model.layers:
        layer.self_attn.sinks.fill_(-1e4)
    assert not torch.allclose(logits(model, inputs, None, 5), right, atol=1e-2)
