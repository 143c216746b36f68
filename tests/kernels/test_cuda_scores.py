"""The CUDA kernels' scores against the reference: emulated everywhere, on the GPU where there is one."""

import math

import pytest
import torch

from kvmosaic.kernels import gpu
from kvmosaic.kernels.scores import cuda, reference
from kvmosaic.selection import Order
from kvmosaic.stores import EXACT, EvictingStore


@pytest.mark.parametrize(
    ("tokens", "heads", "groups", "channels", "asking", "dtype"),
    [
        (150, 2, 2, 64, "all", torch.bfloat16),
        (67, 1, 3, 80, "some", torch.float16),
        (140, 1, 1, 128, "newest", torch.bfloat16),
        (20, 1, 2, 256, "all", torch.bfloat16),
    ],
)
def test_column_sums_are_the_references(
    tokens: int, heads: int, groups: int, channels: int, asking: str, dtype: torch.dtype, gpu_device: torch.device
) -> None:
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


@pytest.mark.parametrize("order", [Order(4, 8, by_score=True), Order(0, 0, by_score=False)])
def test_a_steps_token_takes_the_slot_of_the_one_that_leaves_first(order: Order, gpu_device: torch.device) -> None:
    """Rows of several parts; two are full, in one nothing may leave, one has room."""
    slots, size = 2500, (2, 2, 2501)
    draw = torch.Generator().manual_seed(0)
    empty = torch.empty(2, 2, 0, 16, dtype=torch.bfloat16, device=gpu_device)
    store = EvictingStore(EXACT.open(0, empty, empty))
    store.capacity = torch.full((2,), slots, device=gpu_device)
    store.pin(slots)
    store.length[:] = held = torch.tensor([[slots, slots], [slots, 1700]], device=gpu_device)
    store.placed[:] = 3000
    store.score[:] = torch.rand(size, generator=draw) * 3
    store.score[0, 1] = torch.inf
    store.position[:] = torch.stack([torch.randperm(3000, generator=draw)[: slots + 1] for _ in range(4)]).view(size)
    logits = 3 * torch.randn(4, 3, slots + 1, generator=draw).to(gpu_device)
    most, total = (9 + torch.rand(2, 3, 4, 3, generator=draw)).to(gpu_device)
    joined = gpu.Joined(stores=1, count=3, most=most.data_ptr(), sum=total.data_ptr())
    joined.first[1] = 3

    slot = torch.arange(slots + 1, device=gpu_device)
    own, present = slot == held[..., None], slot <= held[..., None]
    received = (logits - torch.logsumexp(most * math.log(2) + total.log(), 0)[..., None] / math.log(2)).exp2().mean(1)
    score = torch.where(own, 0, store.score) + received.view(size)
    position = store.position.masked_fill(own, 3000)
    first = order.rank(position, score, present).masked_fill(~present, torch.inf).argmin(-1)
    expected = torch.where(held < slots, held, torch.where(first == held, -1, first))

    live = torch.ones(1, dtype=torch.int32, device=gpu_device)
    got = cuda.replace(store, order, None, logits, joined, live)
    assert torch.equal(got, expected)
    assert torch.equal(store.length, held + (held < slots)) and bool((store.placed == 3001).all())
    for column, before in ((store.score, score), (store.position, position)):
        new = before.gather(2, held[..., None])  # the own token's
        after = torch.where(slot == expected[..., None], new, before)[slot.expand(size) < held[..., None]]
        torch.testing.assert_close(column[slot.expand(size) < held[..., None]], after, atol=1e-4, rtol=1e-4)
