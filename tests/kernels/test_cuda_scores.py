"""The CUDA kernels' scores against the reference: emulated everywhere, on the GPU where there is one."""

import pytest
import torch

from kvmosaic.kernels.scores import cuda, reference


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "heads", "groups", "channels", "asking"),
    [
        (150, 2, 2, 64, "all"),
        (67, 1, 3, 80, "some"),
        (200, 1, 1, 128, "newest"),
        (40, 1, 2, 256, "all"),
    ],
)
def test_column_sums_are_the_references(
    tokens: int, heads: int, groups: int, channels: int, asking: str, dtype: torch.dtype, gpu_device: torch.device
) -> None:
    if dtype is torch.float16 and channels != 80:
        pytest.skip("one of the second type")
    draw = torch.Generator().manual_seed(tokens)
    query = 2 * torch.randn(2, tokens, heads * groups, channels, generator=draw)  # as a model makes them
    keys = torch.randn(2, tokens, heads, channels, generator=draw)
    query, keys = (x.to(gpu_device, dtype).transpose(1, 2) for x in (query, keys))
    place = torch.arange(tokens, device=gpu_device)
    valid = torch.stack([place >= 0, place >= 5])  # the second row is padded
    some = {"all": place >= 0, "some": place % 3 == 1, "newest": place >= tokens - 7}[asking]
    asked = None if asking == "all" else some.expand(2, -1)
    ours = cuda.column_sums(query, keys, channels**-0.5, valid, asked)
    assert ours is not None, "the kernels serve these heads"
    expected = reference.column_sums(query, keys, channels**-0.5, valid, asked)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
