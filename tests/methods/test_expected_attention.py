"""Expected Attention ranks tokens as queries that really come later do (arXiv:2510.00636)."""

import pytest
import torch

from kvmosaic import Cache, methods
from kvmosaic.errors import UnsupportedModel
from kvmosaic.hooks import models as hooks
from kvmosaic.selection import ExpectedAttention
from kvmosaic.selection.scores import turned
from tests import models
from tests.models import Row, generate, prompt
from tests.selection.test_top import kept, step

HEADS, GROUPS, SIZE, TOKENS, FUTURE = 2, 4, 32, 300, 512


def rotated(x, start):
    angle = (start + torch.arange(x.shape[2]))[:, None] * step().frequencies
    return turned(x, angle.cos(), angle.sin())


def at_random(seed=0):
    """Keys, and queries of one distribution before and after the prompt's end."""
    draw = torch.Generator().manual_seed(seed)
    mean = torch.randn(1, HEADS * GROUPS, 1, SIZE, generator=draw)
    spread = torch.randn(1, HEADS * GROUPS, 1, SIZE, generator=draw) * 0.7
    query = mean + spread * torch.randn(1, HEADS * GROUPS, TOKENS + FUTURE, SIZE, generator=draw)
    keys = torch.randn(1, HEADS, TOKENS, SIZE, generator=draw)
    ones = torch.ones(1, HEADS, TOKENS, SIZE)
    at = step(TOKENS, heads=HEADS, groups=GROUPS)
    query = rotated(query, 0)
    at = at._replace(query=query[:, :, :TOKENS], keys=rotated(keys, 0), values=ones)
    return at, query[:, :, TOKENS:]


def ranks(x):
    return x.argsort(-1).argsort(-1).float()


@pytest.mark.parametrize("seed", range(3))
def test_scores_rank_tokens_as_the_queries_that_come_do(seed):
    at, later = at_random(seed)
    logits = later.unflatten(1, (HEADS, GROUPS)) @ at.keys[:, :, None].mT * at.scale
    real = logits.softmax(-1).mean((2, 3))
    guessed = ExpectedAttention(future=FUTURE, epsilon=0).score(at)
    for head in range(HEADS):
        pair = torch.stack([ranks(real[0, head]), ranks(guessed[0, head])])
        assert torch.corrcoef(pair)[0, 1] > 0.97


def test_where_a_prompt_lies_does_not_matter():
    at, _ = at_random()
    moved = at._replace(place=at.place + 1000, query=rotated_by(at.query, 1000), keys=rotated_by(at.keys, 1000))
    scorer = ExpectedAttention(future=64, epsilon=0)
    # the first four queries count in one of them only
    at = at._replace(place=at.place + 4, query=rotated_by(at.query, 4), keys=rotated_by(at.keys, 4))
    assert torch.allclose(scorer.score(at), scorer.score(moved), rtol=1e-2, atol=1e-6)


def rotated_by(x, places):
    angle = places * step().frequencies
    return turned(x, angle.cos(), angle.sin())


def test_epsilon_makes_long_values_count():
    at, _ = at_random()
    at.values[:, :, 100:110] *= 50
    assert kept(methods.parse("expected_attention tokens=50 recent=8").selection, at)[..., 100:110].all()


@pytest.mark.parametrize("kind", [kind for kind in models.KINDS if kind != "gpt_oss"])
def test_the_models_own_rotation_is_found(kind):
    model = models.model(kind)
    found = torch.tensor(hooks.frequencies(model, "full_attention"))
    config = model.config.get_text_config()
    assert found.shape == (16,) and found[0] == 1
    base = config.rope_parameters.get("full_attention", config.rope_parameters)["rope_theta"]
    assert torch.allclose(found, base ** (-torch.arange(16) / 16), rtol=1e-4)


def test_a_model_whose_rotation_is_not_known_is_refused():
    """gpt-oss has no function that tells how it pairs numbers."""
    model = models.model("gpt_oss")
    with pytest.raises(UnsupportedModel, match=r"rotary_emb.inv_freq.*Use another scorer, e.g. snapkv"):
        generate(model, prompt("gpt_oss", Row(60, 0)), Cache(model, methods.parse("expected_attention")), 2)


def test_numbers_that_make_no_sense_are_refused():
    for text in ("expected_attention future=0", "expected_attention epsilon=-1"):
        with pytest.raises(ValueError, match="at least 1, and epsilon at least 0"):
            methods.parse(text)
