"""A mean kept apart: the same products, no cost for an offset, and padding that enters no mean."""

import pytest
import torch

from kvmosaic.codecs import Centered, Rotated, Sphere, Uniform

CODECS = [Uniform(bits=2, axis="channel"), Uniform(bits=2, axis="token"), Rotated(Sphere(bits=2, scale="unbiased"))]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: type(codec).__name__)
def test_products_are_those_of_the_decoded_tokens(codec):
    x, query, weights = 5 + drawn(2, 2, 63, 64), drawn(2, 2, 3, 64, seed=1), drawn(2, 2, 3, 63, seed=2).softmax(-1)
    centered = Centered(codec)
    packed = centered.encode(x, None)
    decoded = centered.decode(packed)
    assert torch.allclose(centered.logits(query, packed), query @ decoded.mT, atol=1e-3)
    assert torch.allclose(centered.mix(weights, packed), weights @ decoded, atol=1e-4)


@pytest.mark.parametrize("codec", CODECS[1:], ids=lambda codec: type(codec).__name__)
def test_an_offset_of_a_channel_costs_nothing(codec):
    x = drawn(1, 2, 101, 64)
    offset = torch.zeros(64)
    offset[3] = 30
    moved = Centered(codec)
    plain = (x - Centered(codec).decode(Centered(codec).encode(x, None))).square().mean()
    shifted = (x + offset - moved.decode(moved.encode(x + offset, None))).square().mean()
    alone = (x + offset - codec.decode(codec.encode(x + offset, None))).square().mean()
    assert shifted < 1.1 * plain < 0.3 * alone


def test_padding_enters_no_mean_and_no_tokens_have_mean_zero():
    x, valid = drawn(1, 1, 10, 64), torch.arange(10)[None, None] < 7
    x[:, :, 7:] = 1e4
    mean = Centered(CODECS[0]).encode(x, valid)["mean"]
    assert torch.allclose(mean[0, 0, 0].float(), x[0, 0, :7].mean(0), atol=2e-3)
    assert Centered(CODECS[1]).encode(x, torch.zeros_like(valid))["mean"].eq(0).all()
