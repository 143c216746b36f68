"""TurboQuant's fractional bits and its prod variant, by its specification (arXiv:2504.19874)."""

import math

import pytest
import torch
from torch import Tensor

from kvmosaic import methods
from kvmosaic.codecs import Codec, Rotated, Sketched, Sphere, Split, sphere_levels
from kvmosaic.codecs.rotated import rotation
from kvmosaic.codecs.sketched import sketch
from tests.selection.test_eviction import Stream, layer_of

DISTORTION = {(32, 3): 0.03226, (32, 4): 0.00877, (96, 2): 0.1155, (96, 3): 0.03377}
"""Squared error of a unit vector, at (channels, bits)."""


def error(codec: Codec, x: Tensor) -> float:
    return float((x - codec.decode(codec.encode(x, None))).square().sum() / x.square().sum())


def split(bits: float) -> Split:
    codec = methods.turboquant(key_bits=bits).tiers[0].keys.codec
    assert isinstance(codec, Split)
    return codec


@pytest.mark.parametrize("bits", [2.5, 3.5])
def test_each_part_has_the_distortion_of_its_own_size(bits: float) -> None:
    x = torch.randn(1, 1, 20_000, 128, generator=torch.Generator().manual_seed(0))
    codec = split(bits)
    for part, channels, whole in ((codec.first, slice(0, 32), int(bits) + 1), (codec.rest, slice(32, None), int(bits))):
        mine = x[..., channels]
        assert isinstance(part, Rotated)
        plain = Rotated(Sphere(bits=whole, scale="norm"), part.seed)
        integers = 1.011 if whole == 2 else 1.003  # what evenly spaced and rounded levels add at most
        assert (
            DISTORTION[mine.shape[-1], whole] * 0.99
            < error(plain, mine)
            < DISTORTION[mine.shape[-1], whole] * 1.01 * integers
        )


def test_levels_for_the_whole_head_spoil_the_outliers() -> None:
    """What the supplement does: 32 channels with the levels of 128. The size of a part must be its own."""
    x = torch.randn(20_000, 32, generator=torch.Generator().manual_seed(0))
    unit, integers = sphere_levels(128, 3)
    levels = unit * integers.float() / math.sqrt(128)
    turned = x / x.norm(dim=-1, keepdim=True) @ rotation(32, 0, torch.device("cpu"))
    nearest = levels[torch.bucketize(turned, (levels[1:] + levels[:-1]) / 2)]
    assert float((turned - nearest).square().sum(-1).mean()) == pytest.approx(0.125, rel=0.05)


def test_bits_count_as_the_paper_counts_them() -> None:
    """2.5 bits = (32 * 3 + 96 * 2 + two norms) / 128."""
    parts = split(2.5).parts(128).values()
    assert sum(part.width * part.bits for part in parts) == 2.5 * 128
    values = methods.turboquant(bits=2.5).tiers[0].values.codec.parts(128).values()
    assert sum(part.width * part.bits for part in values) == 2 * 128 + 16


def test_the_channels_of_largest_norm_over_the_prompt_get_more_bits() -> None:
    """And keep their place when tokens come later whose others are larger."""
    stream, layer = Stream(60), layer_of("turboquant bits=2.5 outliers=8")
    large = torch.tensor([3, 4, 9, 11, 17, 20, 28, 31])
    stream.keys[..., large] *= 10
    stream.feed(layer, 0, 40)
    stream.keys[:, :, 40:] = stream.keys[:, :, 40:].flip(-1)
    stream.feed(layer, 40, 60)
    order = layer.stores["tier 0"].keys.basis.index
    assert torch.equal(order[..., :8].long().sort().values, large.expand(1, 2, 8))
    assert torch.equal(order.long().sort().values, torch.arange(32).expand(1, 2, 32))


def test_outliers_apart_are_worth_a_bit_for_all() -> None:
    """Of keys whose first quarter of channels is six times the rest."""
    x = torch.randn(1, 1, 4000, 128, generator=torch.Generator().manual_seed(3))
    x[..., :32] *= 6
    two, three = (error(methods.turboquant(key_bits=bits).tiers[0].keys.codec, x) for bits in (2, 3))
    assert three < error(split(2.5), x) < 1.3 * three < 0.5 * two


def test_prod_is_right_in_the_mean_and_noisier_than_a_bit_more() -> None:
    draw = torch.Generator().manual_seed(1)
    x, query = torch.randn(2, 1, 1, 1, 128, generator=draw)
    x, query = x / x.norm(), query - (query * x).sum() * x / x.square().sum() + 0.5 * x
    coarse = Sphere(bits=1, scale="norm")
    rest = (x - coarse.decode(coarse.encode(x, None))).flatten()
    products = torch.stack(
        [
            (query * codec.decode(codec.encode(x, None))).sum()
            for codec in (Sketched(codec=coarse, seed=seed) for seed in range(2000))
        ]
    )
    spread = float(products.std())
    assert abs(float(products.mean()) - float((query * x).sum())) < 4 * spread / math.sqrt(2000)
    along = float(query.flatten() @ rest) / float(rest.norm())
    variance = float(rest.norm()) ** 2 / 128 * (math.pi / 2 * float(query.norm()) ** 2 - along**2)
    assert spread**2 == pytest.approx(variance, rel=0.15)


@pytest.mark.parametrize(("bits", "distortion"), [(2, 0.564), (3, 0.182), (4, 0.053)])
def test_prod_has_the_distortion_of_the_specification(bits: int, distortion: float) -> None:
    x = torch.randn(1, 1, 8000, 128, generator=torch.Generator().manual_seed(2))
    codec = methods.turboquant(bits=bits, variant="prod").tiers[0].keys.codec
    assert error(codec, x) == pytest.approx(distortion, rel=0.05)  # one matrix A, itself random
    assert error(methods.turboquant(bits=bits).tiers[0].values.codec, x) < 0.3 * distortion
    stored = sum(part.width * part.bits for part in codec.parts(128).values())
    assert stored == bits * 128 + 32


def test_a_sketch_is_drawn_once() -> None:
    assert sketch(64, 0, torch.device("cpu")) is sketch(64, 0, torch.device("cpu"))
    assert not torch.equal(sketch(64, 0, torch.device("cpu")), sketch(64, 1, torch.device("cpu")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("turboquant bits=2.25", "a half more for outlier channels, got 2.25"),
        ("turboquant value_bits=2.5", "got 2.5"),
        ("turboquant variant=best", "'mse' or 'prod', got 'best'"),
        ("turboquant bits=1 variant=prod", "got 0"),
    ],
)
def test_bits_that_do_not_exist_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        methods.parse(text)


def test_more_outliers_than_channels_are_refused_at_the_prompt() -> None:
    with pytest.raises(ValueError, match="must be fewer than the head's 32"):
        Stream(5).feed(layer_of("turboquant bits=2.5"), 0, 5)
