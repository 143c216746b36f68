"""Coupled channels on the GPU's kernels against the reference: emulated everywhere, on the GPU where there is one."""

import pytest
import torch

from kvmosaic.codecs import Coupled, Exact
from kvmosaic.kernels import encode, gpu
from kvmosaic.kernels.attention import cuda
from kvmosaic.stores import Lane
from tests.kernels.test_cuda_attention import assert_alike, assert_nan_stays_in_its_row, both, filled
from tests.kernels.test_cuda_encode import codes_differ


def coupled(channels: int, c: int, bits: int, window: int = 0, seed: int = 0) -> tuple[Lane, Lane]:
    draw = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 2, channels // c, 2**bits, c, generator=draw).half()
    return Lane(Coupled(keys), window), Lane(Coupled(values), window)


@pytest.mark.parametrize(
    ("channels", "c", "bits"),
    [(64, 8, 8), (64, 4, 4), (80, 8, 8), (96, 4, 8), (128, 8, 8), (128, 4, 8), (128, 2, 3), (128, 8, 10), (256, 8, 8)],
)
def test_attention_is_the_references(channels: int, c: int, bits: int, gpu_device: torch.device) -> None:
    store = filled(coupled(channels, c, bits), gpu_device, channels=channels, lengths=(150, 20))
    assert_alike(*both(store))


@pytest.mark.parametrize("rows", [1, 7, 16])
def test_any_number_of_queries_may_share_a_head(rows: int, gpu_device: torch.device) -> None:
    assert_alike(*both(filled(coupled(64, 8, 6), gpu_device, lengths=(90,)), rows=rows))


@pytest.mark.parametrize("lengths", [(), (1, 2), (150, 40, 1, 61)])
@pytest.mark.parametrize("fresh", [0, 3])
def test_windows_and_tokens_of_the_step_are_attended(
    lengths: tuple[int, ...], fresh: int, gpu_device: torch.device
) -> None:
    assert_alike(*both(filled(coupled(64, 4, 4, window=33), gpu_device, lengths=lengths), fresh=fresh))


def test_float16_models_and_capped_logits_are_served(gpu_device: torch.device) -> None:
    store = filled(coupled(64, 8, 6, window=5), gpu_device, lengths=(90,), dtype=torch.float16)
    assert_alike(*both(store, softcap=2.0))


def test_a_small_shared_memory_makes_it_slower_not_wrong(
    gpu_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An A10's: the centroids of the values stay in global memory."""
    monkeypatch.setattr(gpu, "most_shared", lambda device: 99 * 1024)
    assert_alike(*both(filled(coupled(128, 8, 8), gpu_device, channels=128, lengths=(70,))))


def test_nan_in_a_query_stays_in_its_row(gpu_device: torch.device) -> None:
    assert_nan_stays_in_its_row(filled(coupled(64, 8, 4), gpu_device, lengths=(150,)))


@pytest.mark.parametrize(("channels", "c", "bits"), [(64, 8, 8), (80, 2, 3), (128, 8, 10)])
def test_bytes_are_the_codecs(
    channels: int, c: int, bits: int, gpu_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for a few that lie between two centroids (sums come in another order)."""
    stores, lanes = [], coupled(channels, c, bits, window=7)
    for write in (encode.cuda.write, lambda *_: False):
        with monkeypatch.context() as patch:
            patch.setattr(encode, "write", write)
            stores.append(filled(lanes, gpu_device, channels=channels, lengths=(150, 1, 40)))
    assert codes_differ(*stores) <= 0.002 * sum(tensor.numel() for _, _, tensor in stores[0].tensors())


@pytest.mark.parametrize(
    ("lanes", "reason"),
    [
        ((coupled(64, 8, 4)[0], Lane(Exact())), "Exact on the other"),
        (coupled(64, 1, 4), "1 coupled channels"),
        (coupled(64, 2, 12), "do not fit"),
        ((coupled(64, 8, 4)[0], coupled(64, 8, 4, window=9)[1]), "at the same time"),
    ],
)
def test_what_is_not_served_is_named(lanes: tuple[Lane, Lane], reason: str) -> None:
    assert reason in (cuda.why_not(*lanes, 64) or "")
