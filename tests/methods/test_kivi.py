"""KIVI by section 8 of its specification."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvmosaic import methods
from kvmosaic.codecs import Uniform
from kvmosaic.stores import CodedStore


def stream(recipe: object, keys: Tensor, values: Tensor, pieces: list[int]) -> CodedStore:
    store, start = recipe.tiers[0].open(0, keys, values), 0  # type: ignore[attr-defined]
    for size in pieces:
        store.put(keys[:, :, start : start + size], values[:, :, start : start + size], None)
        start += size
    return store


def numbers(tokens: int, channels: int = 64, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor]:
    keys, values = torch.randn(2, 1, 2, tokens, channels, generator=torch.Generator().manual_seed(0)).to(dtype)
    return keys, values


@given(
    pieces=st.lists(st.one_of(st.integers(1, 3), st.integers(1, 300)), min_size=1, max_size=8),
    residual=st.sampled_from([32, 64, 128]),
)
def test_boundaries_after_any_mix_of_prompts_and_tokens(pieces: list[int], residual: int) -> None:
    """Keys: all but the last T mod R are encoded. Values: all but the last R."""
    total = sum(pieces)
    store = stream(methods.kivi(residual=residual), *numbers(total), pieces)
    assert (store.length == total).all()
    assert (store.keys.coded == total - total % residual).all()
    assert (store.values.coded == max(0, total - residual)).all()


@pytest.mark.parametrize("residual", [32, 128])
def test_token_by_token_gives_the_groups_of_one_prompt(residual: int) -> None:
    keys, values = numbers(300)
    once = stream(methods.kivi(bits=2, residual=residual), keys, values, [300])
    slowly = stream(methods.kivi(bits=2, residual=residual), keys, values, [1] * 300)
    for one, other in ((once.keys, slowly.keys), (once.values, slowly.values)):
        stop = int(one.coded.min())
        assert torch.equal(one.coded, other.coded)
        for name, part in one.read(0, stop).items():
            assert torch.equal(part, other.read(0, stop)[name]), name
    query = torch.randn(1, 2, 4, 64, generator=torch.Generator().manual_seed(1))
    mine, right = slowly.attend(query, 0.1, None), once.attend(query, 0.1, None)
    assert torch.allclose(mine.out, right.out, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("tokens", "key_tokens", "value_tokens"), [(127, 0, 0), (128, 128, 0), (129, 128, 1)])
def test_what_a_prompt_around_the_residual_encodes(tokens: int, key_tokens: int, value_tokens: int) -> None:
    store = stream(methods.kivi(residual=128), *numbers(tokens), [tokens])
    assert int(store.keys.coded.max()) == key_tokens
    assert int(store.values.coded.max()) == value_tokens


@pytest.mark.parametrize(
    ("tokens", "residual", "ratio"),
    [(840, 128, 3.52), (840, 32, 4.83), (4096, 128, 5.00), (32768, 128, 5.29), (120, 32, 2.65)],
)
def test_compression_is_the_papers(tokens: int, residual: int, ratio: float) -> None:
    """Section 4's table at 2 bits, from the bytes of what is stored; then what room for growth adds to it."""
    store = stream(methods.kivi(bits=2, residual=residual), *numbers(tokens, 128), [tokens])
    used = 0.0
    for lane in (store.keys, store.values):
        coded = int(lane.coded.max())
        for name, part in lane.parts.items():
            entries = coded if part.every == 1 else coded // part.every  # type: ignore[operator]
            used += 2 * entries * part.width * part.bits / 8
            slack = lane.buffers[name].nbytes - 2 * entries * part.width * part.bits / 8
            # whole blocks of 128 tokens of codes, 32 tokens of parameters, a sixteenth more
            assert 0 <= slack <= 2 * part.width * part.bits / 8 * (128 + coded / 16)
        used += 2 * (tokens - coded) * 128 * 2
        assert lane.ring.shape[2] <= residual
    assert 2 * 2 * tokens * 128 * 2 / used == pytest.approx(ratio, abs=0.01)
    held = sum(tensor.nbytes for _, _, tensor in store.tensors())
    assert held >= used
    if tokens >= 4096:
        assert 2 * 2 * tokens * 128 * 2 / held == pytest.approx(ratio, rel=0.08)  # a ring for R keys, however few wait


@pytest.mark.parametrize(("bits", "error"), [(1, 1.96), (2, 0.154), (4, 0.0061), (8, 2.1e-5)])
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_error_on_gaussian_channels(bits: int, error: float, axis: str) -> None:
    codec = Uniform(bits=bits, axis=axis, group=32)  # type: ignore[arg-type]
    x = torch.randn(1, 4, 2048, 128, generator=torch.Generator().manual_seed(0))
    assert float((codec.decode(codec.encode(x, None)) - x).square().mean()) == pytest.approx(error, rel=0.03)


@pytest.mark.parametrize(("bits", "by_channel", "by_token"), [(2, 0.69, 0.90), (4, 0.14, 0.32)])
def test_keys_with_outlying_channels_want_ranges_of_their_own(bits: int, by_channel: float, by_token: float) -> None:
    """Six channels of size 6 at 20: the error of attention's output, by the axis of the keys' ranges."""
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, 8, 512, 128, generator=generator)
    keys[..., :6] = keys[..., :6] * 6 + 20
    query = torch.randn(1, 8, 16, 128, generator=generator)
    right = (query @ keys.mT / 128**0.5).softmax(-1) @ values

    def off(axis: str) -> float:
        codec = Uniform(bits=bits, axis=axis, group=32)  # type: ignore[arg-type]
        found = (codec.logits(query, codec.encode(keys, None)) / 128**0.5).softmax(-1) @ values
        return float((found - right).norm() / right.norm())

    assert off("channel") == pytest.approx(by_channel, rel=0.35)
    assert off("token") == pytest.approx(by_token, rel=0.35)
    assert off("channel") < off("token")


def test_the_residual_is_a_multiple_of_the_group() -> None:
    with pytest.raises(ValueError, match=r"residual must be a positive multiple of group .*got 100 and 32"):
        methods.kivi(residual=100)
