"""A layer whose steps are kernels only goes the way of one whose steps are not: same outputs, same tokens, same columns."""

import pytest
import torch
from torch import Tensor, nn

from kvmosaic import Recipe, methods
from kvmosaic.hooks.layer import CacheLayer
from kvmosaic.hooks.pinned import Pinned, is_ready
from kvmosaic.stores import EXACT

HEADS, GROUPS, SIZE = 2, 2, 32


class Stream:
    """Random tokens of two rows, the second of which begins with padding."""

    def __init__(self, device: torch.device, prompt: int, padding: int, steps: int, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        size = (2, HEADS * GROUPS, prompt + steps, SIZE)
        self.query = (2 * torch.randn(size, generator=draw)).to(device, torch.bfloat16)
        self.states = torch.randn(2, 2, HEADS, *size[2:], generator=draw).to(device, torch.bfloat16)
        self.prompt, self.steps = prompt, steps
        place = torch.arange(prompt, device=device)
        seen = (place[:, None] >= place) & (place >= torch.tensor([[0], [padding]], device=device)[:, None])
        self.mask = (seen | (place[:, None] == place) & ~seen.any(-1, keepdim=True))[:, None]

    def layer(self, recipe: Recipe) -> CacheLayer:
        """One that has seen the prompt."""
        layer = CacheLayer(0, 1, recipe)
        self.feed(layer, 0, self.prompt, self.mask)
        return layer

    def feed(self, layer: CacheLayer, start: int, stop: int, mask: Tensor | None = None) -> Tensor:
        keys, values = self.states[..., start:stop, :]
        handle, _ = layer.update(keys, values)
        module = nn.Module()
        module.num_key_value_groups = GROUPS
        return layer.attend(module, self.query[:, :, start:stop], handle, mask, SIZE**-0.5, None, None)

    def steps_of(self, layer: CacheLayer, first: int = 0) -> Tensor:
        start = self.prompt + first
        return torch.cat([self.feed(layer, now, now + 1) for now in range(start, self.prompt + self.steps)], 1)


def columns(layer: CacheLayer) -> dict[str, Tensor]:
    """Of the tokens that are held, in the order of their slots."""
    store = layer.stores["tier 0"]
    held = torch.arange(store.position.shape[2], device=store.length.device) < store.length[..., None]
    return dict(length=store.length, placed=store.placed, position=store.position[held], score=store.score[held])


@pytest.mark.parametrize(
    ("text", "padding", "steps"),
    [
        ("h2o tokens=40 recent=8", 20, 300),  # the second row first grows to 40
        ("h2o tokens=30 recent=0 protect=4 | turboquant bits=4", 3, 12),
        ("streaming_llm tokens=40", 20, 30),
    ],
)
def test_evicting_steps_replace_the_same_tokens(text: str, padding: int, steps: int, gpu_device: torch.device) -> None:
    steps = steps if gpu_device.type == "cuda" else min(steps, 100)  # the emulation takes 20 ms a step
    stream = Stream(gpu_device, 45, padding, steps)
    eager, pinned = (stream.layer(methods.parse(text)) for _ in range(2))
    live = torch.ones(1, dtype=torch.int32, device=gpu_device)
    pinned.pinned = Pinned(pinned, steps, live)
    torch.testing.assert_close(stream.steps_of(pinned), stream.steps_of(eager), atol=0.02, rtol=0.02)
    expected, got = columns(eager), columns(pinned)
    torch.testing.assert_close(got.pop("score"), expected.pop("score"), atol=2e-3, rtol=1e-4)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("text", "steps"),
    [("zipcache gather=12", 23), ("zipvl mass=0.7 gather=12 evict=true", 13)],
)
def test_tokens_wait_and_get_the_tiers_that_they_would_get(text: str, steps: int, gpu_device: torch.device) -> None:
    stream = Stream(gpu_device, 45, 20, 3 + steps + 2)
    eager, pinned = (stream.layer(methods.parse(text)) for _ in range(2))
    for layer in (eager, pinned):  # some wait already
        for now in range(45, 48):
            stream.feed(layer, now, now + 1)
    assert is_ready(pinned)
    pinned.pinned = Pinned(pinned, steps + 12, torch.ones(1, dtype=torch.int32, device=gpu_device))
    waiting = pinned.pinned.waiting
    for now in range(48, 48 + steps):
        expected, got = stream.feed(eager, now, now + 1), stream.feed(pinned, now, now + 1)
        torch.testing.assert_close(got, expected, atol=0.02, rtol=0.02)
        if waiting is not None and len(waiting) == 12:
            pinned.pinned.gather(pinned)
    pinned.pinned.gather(pinned)  # which is one too many, and changes nothing
    pinned.pinned.end(pinned, steps)
    pinned.pinned.release(pinned)
    assert pinned.seen == eager.seen and pinned.stores.keys() == eager.stores.keys()
    for name, store in eager.stores.items():
        assert torch.equal(pinned.stores[name].length, store.length)
    assert (pinned.pending is None) == (eager.pending is None)
    if eager.pending is not None:
        assert torch.equal(pinned.pending.keys, eager.pending.keys)
        assert torch.equal(pinned.pending.asked, eager.pending.asked)
        torch.testing.assert_close(pinned.pending.score, eager.pending.score, atol=1e-3, rtol=1e-3)
    more = [stream.steps_of(layer, 3 + steps) for layer in (pinned, eager)]
    torch.testing.assert_close(*more, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("text", ["exact", "h2o tokens=40 recent=8"])
def test_the_first_tokens_have_a_store_of_their_own(text: str, gpu_device: torch.device) -> None:
    stream, recipe = Stream(gpu_device, 45, 20, 10), Recipe(tiers=(EXACT,), first=5) | methods.parse(text)
    eager, pinned = (stream.layer(recipe) for _ in range(2))
    assert is_ready(pinned)
    pinned.pinned = Pinned(pinned, 10, torch.ones(1, dtype=torch.int32, device=gpu_device))
    torch.testing.assert_close(stream.steps_of(pinned), stream.steps_of(eager), atol=0.02, rtol=0.02)
    assert torch.equal(pinned.stores["first"].length, torch.full((2, HEADS), 5, device=gpu_device))
    assert torch.equal(pinned.stores["tier 0"].length, eager.stores["tier 0"].length)


def test_a_step_after_the_end_changes_nothing(gpu_device: torch.device) -> None:
    stream = Stream(gpu_device, 45, 20, 2)
    layer = stream.layer(methods.parse("h2o tokens=40 recent=8"))
    live = torch.zeros(1, dtype=torch.int32, device=gpu_device)
    layer.pinned = Pinned(layer, 2, live)
    before = {name: tensor.clone() for name, _, tensor in layer.tensors()}
    stream.steps_of(layer)
    assert all(torch.equal(before[name], tensor) for name, _, tensor in layer.tensors())


def test_an_evicting_layer_goes_on_as_any_other_when_it_is_no_longer_pinned(gpu_device: torch.device) -> None:
    stream = Stream(gpu_device, 45, 20, 24)
    eager, pinned = (stream.layer(methods.parse("h2o tokens=40 recent=8")) for _ in range(2))
    pinned.pinned = Pinned(pinned, 12, torch.ones(1, dtype=torch.int32, device=gpu_device))
    for now in range(45, 57):
        stream.feed(pinned, now, now + 1)
        stream.feed(eager, now, now + 1)
    pinned.pinned, pinned.seen = None, pinned.seen + 12
    torch.testing.assert_close(stream.steps_of(pinned, 12), stream.steps_of(eager, 12), atol=0.02, rtol=0.02)
    assert torch.equal(columns(pinned)["position"], columns(eager)["position"])
