"""What every codec promises."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvmosaic import codecs
from kvmosaic.codecs import Codec, Exact, Packed, Uniform
from tests.instances import CODECS

every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
ranged = {name: codec for name, codec in CODECS.items() if isinstance(codec, Uniform) and codec.clip == 1.0}


def numbers(tokens: int, channels: int = 64, heads: int = 2, batch: int = 2, seed: int = 0) -> Tensor:
    """Keys as models make them: channels of unlike sizes and offsets."""
    generator = torch.Generator().manual_seed(seed)
    size, offset = torch.rand(2, channels, generator=generator).mul(torch.tensor([[4.0], [3.0]]))
    return torch.randn(batch, heads, tokens, channels, generator=generator) * size + offset


def lengths(codec: Codec) -> list[int]:
    """Odd ones; whole groups where the codec has groups of tokens."""
    unit = max(part.every or 1 for part in codec.parts(64).values())
    return [0, unit, 3 * unit, 63 // unit * unit or unit, 7 * unit]


def close(mine: Tensor, right: Tensor) -> bool:
    return torch.allclose(
        mine, right, rtol=1e-4, atol=1e-4 * max(1.0, float(right.abs().max()) if right.numel() else 1)
    )


def test_every_codec_is_held_to_these_promises() -> None:
    made = {type(codec).__name__ for codec in CODECS.values()}
    offered = {
        name for name in codecs.__all__ if isinstance(each := getattr(codecs, name), type) and hasattr(each, "encode")
    }
    assert offered - {"Codec"} <= made


@every_codec
def test_a_head_alone_is_written_as_beside_others(codec: Codec) -> None:
    x = numbers(lengths(codec)[2])
    both = codec.encode(x, None)
    for head in range(2):
        alone = codec.of_head(head)
        packed = alone.encode(x[:, head : head + 1], None)
        assert all(close(packed[name].float(), both[name][:, head : head + 1].float()) for name in both)
        assert close(alone.decode(packed), codec.decode(both)[:, head : head + 1])


@every_codec
def test_parts_say_what_encode_makes(codec: Codec) -> None:
    for tokens in lengths(codec):
        x = numbers(tokens)
        packed, parts = codec.encode(x, None), codec.parts(64)
        assert packed.keys() == parts.keys()
        for name, part in parts.items():
            entries = tokens // part.every if part.every else min(1, tokens)
            if part.every or tokens:
                assert packed[name].shape == (2, 2, entries, part.width), name
            assert packed[name].dtype == (part.dtype or x.dtype)
            assert part.bits >= 8 or not packed[name].numel() or int(packed[name].max()) < 2**part.bits
            assert part.kind in ("codes", "scales", "exact")
            assert part.bits >= 8 or part.blocked


@every_codec
def test_a_number_that_was_decoded_decodes_to_itself(codec: Codec) -> None:
    """Idempotence, where the range is not shrunk again."""
    if (
        getattr(codec, "clip", 1.0) != 1.0
        or getattr(codec, "equalize", False)
        or not isinstance(codec, Uniform | Exact)
    ):
        pytest.skip("encoding again shrinks the range, or fits another scale")
    once = codec.decode(codec.encode(numbers(96), None))
    again = codec.decode(codec.encode(once, None))
    # the ends of the range move by a rounding of float16
    assert torch.allclose(again, once, rtol=2e-3, atol=4e-3 * float(once.abs().max()))


@pytest.mark.parametrize("codec", ranged.values(), ids=ranged)
def test_decode_inverts_encode_on_representable_values(codec: Uniform) -> None:
    """low + scale * code with float16 parameters and both ends of the range in use."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 2**codec.bits, (2, 2, 96, 64), generator=generator)
    dim = 2 if codec.axis == "channel" else 3
    size = codec.group or codes.shape[dim]
    grouped = codes.unflatten(dim, (-1, size))
    grouped.select(dim + 1, 0).fill_(0)
    grouped.select(dim + 1, 1).fill_(2**codec.bits - 1)
    shape = [*grouped.shape]
    shape[dim + 1] = 1
    low = torch.randint(-8, 8, shape, generator=generator) / 4
    scale = 2.0 ** torch.randint(-4, 1, shape, generator=generator)
    x = (low + scale * grouped).flatten(dim, dim + 1)
    packed = codec.encode(x, None)
    if codec.equalize:  # its channel factor is an irrational number in float16
        assert torch.allclose(codec.decode(packed), x, atol=0.5 * float(x.abs().max()) / (2**codec.bits - 1) * 2)
    else:
        assert torch.equal(codec.decode(packed), x)
        assert torch.equal(packed["codes"], codes.to(torch.uint8))


@every_codec
def test_products_over_the_codes_are_those_over_the_decoded_numbers(codec: Codec) -> None:
    for tokens in lengths(codec)[1:]:
        packed = codec.encode(numbers(tokens), None)
        generator = torch.Generator().manual_seed(2)
        query = torch.randn(2, 2, 7, 64, generator=generator)
        weights = torch.randn(2, 2, 7, tokens, generator=generator).softmax(-1)
        dense = codec.decode(packed)
        assert close(codec.logits(query, packed), query @ dense.mT)
        assert close(codec.mix(weights, packed), weights @ dense)


@every_codec
def test_merge_of_halves_is_the_whole(codec: Codec) -> None:
    """Products over a run that is cut between groups, with the parameters of the run."""
    tokens = 2 * lengths(codec)[2]
    packed, parts = codec.encode(numbers(tokens), None), codec.parts(64)
    query = torch.randn(2, 2, 3, 64, generator=torch.Generator().manual_seed(3))
    weights = torch.rand(2, 2, 3, tokens, generator=torch.Generator().manual_seed(4))

    def half(first: bool) -> Packed:
        cut = {}
        for name, part in parts.items():
            middle = packed[name].shape[2] // 2
            cut[name] = (
                packed[name]
                if part.every is None
                else packed[name][:, :, :middle]
                if first
                else packed[name][:, :, middle:]
            )
        return cut

    logits = torch.cat([codec.logits(query, half(True)), codec.logits(query, half(False))], -1)
    mixed = codec.mix(weights[..., : tokens // 2], half(True)) + codec.mix(weights[..., tokens // 2 :], half(False))
    assert close(logits, codec.logits(query, packed))
    assert close(mixed, codec.mix(weights, packed))


@every_codec
def test_tokens_that_are_not_there_enter_no_range(codec: Codec) -> None:
    """Ragged rows: the second row's tail is none of its tokens, and the third row has none at all."""
    unit = lengths(codec)[1]
    x = numbers(3 * unit, batch=3)
    valid = torch.ones(3, 2, 3 * unit, dtype=torch.bool)
    valid[1, :, 2 * unit :] = valid[2] = False
    x[1, :, 2 * unit :] = 1000
    packed, parts = codec.encode(x, valid), codec.parts(64)
    for row, tokens in ((0, 3 * unit), (1, 2 * unit)):
        alone = codec.encode(x[row : row + 1, :, :tokens], None)
        for name, part in parts.items():
            entries = tokens // part.every if part.every else 1
            assert torch.equal(packed[name][row : row + 1, :, :entries], alone[name]), name
    assert all(part.isfinite().all() for part in packed.values())


@every_codec
def test_float32_and_bfloat16_are_encoded_alike(codec: Codec) -> None:
    x = numbers(96).bfloat16()
    mine, right = codec.decode(codec.encode(x, None)), codec.decode(codec.encode(x.float(), None))
    assert torch.equal(mine, right)


@given(
    bits=st.sampled_from([1, 2, 4, 8]),
    axis=st.sampled_from(["channel", "token"]),
    channels=st.sampled_from([64, 80, 96, 128, 256]),
    groups=st.integers(1, 5),
    heads=st.sampled_from([1, 4, 7, 8]),
    run=st.booleans(),
    offset=st.floats(-30, 30),
    spread=st.floats(1e-3, 30),
    seed=st.integers(0, 99),
)
def test_an_error_is_at_most_half_a_step(
    bits: int, axis: str, channels: int, groups: int, heads: int, run: bool, offset: float, spread: float, seed: int
) -> None:
    group = None if run else 16
    codec = Uniform(bits=bits, axis=axis, group=group)  # type: ignore[arg-type]
    tokens = groups * 16 if axis == "channel" and not run else 2 * groups - 1
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, heads, tokens, channels, generator=generator) * spread + offset
    packed = codec.encode(x, None)
    dim = 2 if axis == "channel" else 3
    step = packed["scale"].float().repeat_interleave(x.shape[dim] // packed["scale"].shape[dim], dim)
    # `low` is rounded to float16 (11 bits), and so is the step, which the highest code feels 2**bits - 1 times
    rounding = x.abs().max() * 2.0**-11 + step * (2**bits - 1) * 2.0**-11 + 1e-6
    assert bool(((codec.decode(packed) - x).abs() <= step / 2 + rounding).all())


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_constant_and_two_valued_groups_are_exact(bits: int, axis: str) -> None:
    codec = Uniform(bits=bits, axis=axis, group=32)  # type: ignore[arg-type]
    x = torch.full((1, 2, 64, 64), 1.5)
    x[0, 0] = torch.where(torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) < 0.5, -0.75, 1.5)
    found = codec.decode(codec.encode(x, None))
    assert torch.equal(found[0, 1], x[0, 1])
    assert float((found - x).abs().max()) <= 2.25 * 2**-11  # the step in float16
    zeros = torch.zeros(1, 1, 32, 64)
    assert torch.equal(codec.decode(codec.encode(zeros, None)), zeros)


def test_large_numbers_keep_their_order_of_error() -> None:
    """8 < 4 < 2 < 1 bits, for keys whose channels are far from zero, too."""
    x = numbers(128) + 20
    errors = [
        float((codec.decode(codec.encode(x, None)) - x).square().mean())
        for codec in map(CODECS.get, ("channel8", "channel4", "channel2", "channel1"))
    ]
    assert errors == sorted(errors)
    assert math.isfinite(errors[-1])


@pytest.mark.parametrize("bits", [0, 3, 5, 16, -1, "two"])
def test_bits_that_do_not_exist_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"bits must be 1, 2, 4 or 8 .*got {bits}"):
        Uniform(bits=bits, axis="token")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"axis": "row"}, "axis must be 'channel' or 'token', got 'row'"),
        ({"axis": "token", "group": 0}, "group must be at least 1, got 0"),
        ({"axis": "channel", "clip": 0.0}, "above 0 and at most 1, got 0.0"),
        ({"axis": "channel", "clip": 1.5}, "above 0 and at most 1, got 1.5"),
        ({"axis": "channel", "clip": float("nan")}, "above 0 and at most 1, got nan"),
        ({"axis": "channel", "clip_about": "mean"}, "clip_about must be 'zero' or 'center', got 'mean'"),
        ({"axis": "channel", "equalize": True}, "equalize .* needs axis='token'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Uniform(bits=2, **options)  # type: ignore[arg-type]


def test_a_group_that_does_not_divide_the_head_size_is_refused() -> None:
    with pytest.raises(ValueError, match="group must divide the head size 80, got 32"):
        Uniform(bits=2, axis="token", group=32).parts(80)
