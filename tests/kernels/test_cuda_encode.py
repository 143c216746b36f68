"""The CUDA kernels write the bytes that the codecs write: emulated everywhere, on the GPU where there is one."""

import pytest
import torch

from kvmosaic.codecs import Rotated, Uniform
from kvmosaic.kernels import encode
from kvmosaic.kernels.encode import cuda
from kvmosaic.stores import Coded, CodedStore, Lane
from tests.kernels.test_cuda_attention import STORES

CLIPPED = Lane(Uniform(bits=4, axis="channel", group=64, clip=(0.5, 0.9), clip_about="center"), flush=64)
WRITTEN = {name: STORES[name] for name in STORES if name not in ("exact", "runs 4 and 1", "runs 1 and 8")}
WRITTEN["clipped"] = CLIPPED, Lane(Uniform(bits=1, axis="channel", clip=0.3), 64)
LENGTHS = (300, 1, 40, 1)


def codes_differ(one: CodedStore, other: CodedStore) -> int:
    """How many bytes differ, of all but the rings (whose free slots hold anything)."""
    return sum(
        int((x != y).sum()) if x.shape == y.shape else x.numel()
        for (name, _, x), (_, _, y) in zip(one.tensors(), other.tensors(), strict=True)
        if not name.endswith("ring")
    )


def empty(lanes: tuple[Lane, Lane], channels: int, device: torch.device, dtype: torch.dtype) -> CodedStore:
    nothing = torch.empty(2, 2, 0, channels, dtype=dtype, device=device)
    return CodedStore(Coded(*lanes), nothing, nothing)


@pytest.mark.parametrize("channels", [64, 96])
@pytest.mark.parametrize("name", WRITTEN)
def test_bytes_are_the_codecs(
    name: str, channels: int, gpu_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them; rotated ones but for a few that lie on an edge (sums come in another order)."""
    if channels == 96 and not name.startswith(("runs 1", "kivi", "mosaic 1")):
        pytest.skip("one of each kind at the second head size")
    torch.manual_seed(0)
    ours, expected = (empty(WRITTEN[name], channels, gpu_device, torch.bfloat16) for _ in range(2))
    for tokens in LENGTHS:
        new = torch.randn(2, 2, 2, tokens, channels).to(gpu_device, torch.bfloat16)
        keep = torch.rand(2, 2, tokens, device=gpu_device) < 0.8
        with monkeypatch.context() as patch:
            patch.setattr(
                encode, "write", lambda lane, x, count: cuda.write(lane, x, count) or pytest.fail("not served")
            )
            ours.put(new[0], new[1], keep)
        with monkeypatch.context() as patch:
            patch.setattr(encode, "write", lambda *_: False)
            expected.put(new[0], new[1], keep)
    allowed = 0.002 if isinstance(WRITTEN[name][0].codec, Rotated) else 0
    assert codes_differ(ours, expected) <= allowed * sum(tensor.numel() for _, _, tensor in ours.tensors())
