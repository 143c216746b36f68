"""Learned levels on the GPU's kernels against the reference: emulated everywhere, on the GPU where there is one."""

from functools import cache

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvmosaic.codecs import Exact, Levels
from kvmosaic.hooks.rotary import Rotary
from kvmosaic.kernels.attention import cuda
from kvmosaic.stores import Coded, CodedStore, Lane
from tests.kernels.test_cuda_attention import assert_alike, both


@cache
def rotary(channels: int) -> Rotary:
    """Of a model with heads of that size, and Llama 3.1's scaling."""
    scaling = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=5e5)
    config = LlamaConfig(
        hidden_size=channels, head_dim=channels, num_attention_heads=1, num_hidden_layers=1, intermediate_size=8,
        vocab_size=8, rope_parameters=scaling | {"original_max_position_embeddings": 64},
    )  # fmt: skip
    return Rotary(LlamaForCausalLM(config))


def levels(channels: int, bits: int, outliers: int, window: int = 0, pre_rope: bool = True) -> tuple[Lane, Lane]:
    draw = torch.Generator().manual_seed(bits)
    table = torch.linspace(-1, 1, 2**bits) + 0.2 / 2**bits * torch.randn(2**bits, generator=draw)
    ranges = torch.stack([torch.randn(2, channels, generator=draw), 1 + torch.rand(2, channels, generator=draw)]).half()
    keys, values = (Levels(levels=table, restored=1.1 * table, ranges=own, outliers=outliers) for own in (ranges, None))
    return Lane(keys, window, pre_rope=pre_rope), Lane(values, window)


def filled(
    lanes: tuple[Lane, Lane], device: torch.device, channels: int = 64, lengths: tuple[int, ...] = (100, 20),
    gaps: bool = True, first: int = 0,
) -> CodedStore:  # fmt: skip
    """A store that grew by ragged runs; with gaps, of some of the tokens, heads alike in one run and not in the next."""
    torch.manual_seed(0)
    empty = torch.empty(2, 2, 0, channels, dtype=torch.bfloat16, device=device)
    store = CodedStore(Coded(*lanes), empty, empty, rotary=rotary(channels) if lanes[0].pre_rope else None)
    for turn, tokens in enumerate(lengths):
        new = torch.randn(2, 2, 2, tokens, channels).to(device, torch.bfloat16)
        new[1, 0, 0, :2] = new[1, 0, 0, :2, :1]  # nothing of these values varies
        keep = torch.rand(2, 1 + turn % 2, tokens).expand(-1, 2, -1) < 0.9 if gaps and tokens > 1 else None
        place = torch.arange(first, first + tokens)[None, :, None].expand(2, -1, -1).to(device)
        store.put(new[0], new[1], None if keep is None else keep.to(device), place if lanes[0].pre_rope else None)
        first += tokens
    return store


@pytest.mark.parametrize(
    ("channels", "bits", "outliers"), [(64, 4, 1), (64, 3, 0), (80, 4, 1), (96, 1, 2), (128, 2, 2), (256, 4, 3)]
)
def test_attention_before_rotary_positions_is_the_references(
    channels: int, bits: int, outliers: int, gpu_device: torch.device
) -> None:
    """Levels of values are rounded to float16: with few of them that is an offset, which averages do not take away."""
    store = filled(levels(channels, bits, outliers), gpu_device, channels)
    assert_alike(*both(store), tolerance=1e-3 if bits < 3 else 3e-4)


@pytest.mark.parametrize("window", [0, 33])
@pytest.mark.parametrize("pre_rope", [True, False])
def test_windows_and_rotated_keys_are_served(window: int, pre_rope: bool, gpu_device: torch.device) -> None:
    store = filled(levels(64, 4, 1, window, pre_rope), gpu_device, lengths=(70, 1, 30, 1), gaps=False, first=3000)
    assert_alike(*both(store, rows=7, softcap=5.0, fresh=2))


def test_an_empty_store_has_no_share(gpu_device: torch.device) -> None:
    ours, expected = both(filled(levels(64, 4, 1), gpu_device, lengths=()), fresh=0)
    assert bool((ours.lse == -torch.inf).all()) and not bool(ours.out.any())
    assert_alike(ours, expected)


@pytest.mark.parametrize(
    ("lanes", "reason"),
    [
        ((levels(64, 4, 1)[0], Lane(Exact())), "on one side only"),
        (levels(64, 4, 1)[::-1], "keys by channel and values by token"),
        ((levels(64, 4, 1)[0], levels(64, 4, 1, window=9)[1]), "at the same time"),
    ],
)
def test_what_is_not_served_is_named(lanes: tuple[Lane, Lane], reason: str) -> None:
    assert reason in (cuda.why_not(*lanes, 64) or "")


def test_other_rotations_are_told_apart() -> None:
    plain = rotary(64)
    assert plain.plain(64, torch.device("cpu")) is not None
    assert plain.plain(128, torch.device("cpu")) is None, "a part of the channels is rotated"
