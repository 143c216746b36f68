"""What every store promises, for every codec and rule of flushing: it attends exactly over what its codecs wrote."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvmosaic.codecs import Uniform
from kvmosaic.errors import NotFinite
from kvmosaic.kernels.attention import Affine, merge, reference
from kvmosaic.report import KINDS
from kvmosaic.stores import Coded, CodedStore, Lane, RaggedStore
from tests.instances import CODECS, TIERS, coded

every_tier = pytest.mark.parametrize("tier", TIERS.values(), ids=TIERS)
PIECES = {"at once": (203,), "prompt and tokens": (131, *[1] * 37), "odd": (1, 63, 5, 64, 1, 1, 96, 33)}


def numbers(tokens: int, channels: int = 64, heads: int = 2, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, heads, tokens, channels, generator=generator)
    return keys * (1 + torch.arange(channels) % 3) + 2, values


def fill(tier: Coded, keys: Tensor, values: Tensor, pieces: Sequence[int], keep: Tensor | None = None) -> CodedStore:
    store, start = tier.open(0, keys, values), 0
    for size in pieces:
        part = slice(start, start + size)
        store.put(keys[:, :, part], values[:, :, part], None if keep is None else keep[:, :, part])
        start += size
    assert start == keys.shape[2]
    return store


def kept(lane: Lane, x: Tensor, pieces: Sequence[int]) -> tuple[Tensor, int]:
    """What a lane should hold after these puts, dense, and how many of its tokens encoded: by the words of `Lane`."""
    coded, seen, out = 0, 0, []
    for size in pieces:
        seen += size
        ready = max(0, seen - coded - lane.window) // lane.flush * lane.flush
        if ready:
            out.append(lane.codec.decode(lane.codec.encode(x[:, :, coded : coded + ready], None)))
            coded += ready
    return torch.cat([*out, x[:, :, coded:].float()], 2), coded


def dense(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float | None, affine: Affine | None
) -> tuple[Tensor, Tensor]:
    """Attention in float64 over dense keys and values, in as few words as possible."""
    logits = query.double() @ keys.double().mT * scale
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    if affine:
        least, greatest = logits.amin(-1, keepdim=True), logits.amax(-1, keepdim=True)
        slope = 1 - (affine.high - affine.low) / (greatest - least + 1e-8)
        slope = slope if affine.official else slope.clamp(min=1e-3)
        logits = least - affine.low + (logits - least) * slope
    return logits.softmax(-1) @ values.double(), logits.logsumexp(-1)


def agree(store: CodedStore, tier: Coded, keys: Tensor, values: Tensor, pieces: Sequence[int], rows: int = 5) -> None:
    query = torch.randn(*keys.shape[:2], rows, keys.shape[3], generator=torch.Generator().manual_seed(9))
    (k, _), (v, _) = kept(tier.keys, keys, pieces), kept(tier.values, values, pieces)
    for softcap in (None, 3.0):
        part = store.attend(query, 0.2, softcap)
        out, lse = dense(query, k, v, 0.2, softcap, tier.affine)
        assert torch.allclose(part.out.double(), out, rtol=1e-3, atol=1e-3 * float(out.abs().max()))
        assert torch.allclose(part.lse.double(), lse, rtol=1e-3, atol=1e-3)


@every_tier
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
def test_attention_is_that_over_the_decoded_tokens(tier: Coded, pieces: tuple[int, ...]) -> None:
    keys, values = numbers(sum(pieces))
    store = fill(tier, keys, values, pieces)
    for lane, x in ((store.keys, keys), (store.values, values)):
        assert (lane.coded == kept(lane.lane, x, pieces)[1]).all()
    assert (store.length == sum(pieces)).all()
    agree(store, tier, keys, values, pieces)


@every_tier
def test_the_reference_and_the_chosen_kernel_agree(tier: Coded) -> None:
    pieces = PIECES["prompt and tokens"]
    store = fill(tier, *numbers(sum(pieces)), pieces)
    query = torch.randn(2, 2, 3, 64, generator=torch.Generator().manual_seed(8))
    mine = store.attend(query, 0.2, None)
    right = reference.attend(store.keys, store.values, store.length, query, 0.2, None, tier.affine)
    assert torch.allclose(mine.out, right.out, rtol=1e-3, atol=1e-3)
    assert torch.allclose(mine.lse, right.lse, rtol=1e-3, atol=1e-3)


@every_tier
def test_a_token_is_encoded_once(tier: Coded) -> None:
    """What the oldest slots hold does not change, bit for bit, when others come."""
    keys, values = numbers(300)
    store = tier.open(0, keys, values)
    store.put(keys[:, :, :200], values[:, :, :200], None)
    lanes = store.keys, store.values
    stop = [int(lane.coded.min()) for lane in lanes]
    before = [
        {name: part.clone() for name, part in lane.read(0, end).items()} for lane, end in zip(lanes, stop, strict=True)
    ]
    for start in range(200, 300, 4):
        store.put(keys[:, :, start : start + 4], values[:, :, start : start + 4], None)
    for lane, end, old in zip(lanes, stop, before, strict=True):
        for name, now in lane.read(0, end).items():
            assert torch.equal(now[:, :, : old[name].shape[2]], old[name]), name


@every_tier
def test_ragged_rows_are_those_rows_alone(tier: Coded) -> None:
    """Tokens that a row does not keep take no slot, enter no range and are never attended; a row may keep none."""
    pieces = (97, 1, 1, 40, 1)
    keys, values = numbers(sum(pieces), batch=4)
    keep = torch.rand(4, sum(pieces), generator=torch.Generator().manual_seed(1)) < 0.7
    keep[0], keep[1], keep[3, :97] = True, False, False
    dropped = ~keep[:, None, :, None].expand_as(keys)
    both = fill(
        tier, keys.masked_fill(dropped, 50), values.masked_fill(dropped, -50), pieces, keep[:, None].expand(-1, 2, -1)
    )
    assert torch.equal(both.length, keep.sum(1, keepdim=True).expand(-1, 2))
    query = torch.randn(4, 2, 3, 64, generator=torch.Generator().manual_seed(2))
    found = both.attend(query, 0.2, None)
    assert (found.lse[1] == -torch.inf).all()
    assert (found.out[1] == 0).all()
    bounds = list(itertools.pairwise(itertools.accumulate(pieces, initial=0)))
    for row in (0, 2, 3):
        mine, counts = keep[row].nonzero()[:, 0], [int(keep[row, a:b].sum()) for a, b in bounds]
        single = fill(tier, keys[row : row + 1, :, mine], values[row : row + 1, :, mine], counts)
        alone = single.attend(query[row : row + 1], 0.2, None)
        assert torch.allclose(found.out[row], alone.out[0], rtol=1e-4, atol=1e-4)
        assert torch.allclose(found.lse[row], alone.lse[0], rtol=1e-4, atol=1e-4)
        for lane, other in ((both.keys, single.keys), (both.values, single.values)):
            assert torch.equal(lane.coded[row], other.coded[0])
            end = int(other.coded[0, 0])
            for name, part in other.read(0, end).items():
                if lane.parts[name].every is not None:
                    assert torch.equal(lane.read(0, end)[name][row : row + 1, :, : part.shape[2]], part), name


@every_tier
def test_merge_of_halves_is_the_whole(tier: Coded) -> None:
    """Two stores with a part of the tokens each, merged, are one softmax over what both hold."""
    keys, values = numbers(192)
    query = torch.randn(2, 2, 3, 64, generator=torch.Generator().manual_seed(3))
    halves = [fill(tier, keys[:, :, half], values[:, :, half], (96,)) for half in (slice(96), slice(96, None))]
    found = merge([half.attend(query, 0.2, None) for half in halves])
    if tier.affine is not None:
        pytest.skip("its map takes the range over a whole store")
    dequantized = [
        torch.cat([kept(lane, x[:, :, half], (96,))[0] for half in (slice(96), slice(96, None))], 2)
        for lane, x in ((tier.keys, keys), (tier.values, values))
    ]
    out, lse = dense(query, dequantized[0], dequantized[1], 0.2, None, None)
    assert torch.allclose(found.out.double(), out, rtol=1e-3, atol=1e-3)
    assert torch.allclose(found.lse.double(), lse, rtol=1e-3, atol=1e-3)


@every_tier
def test_tensors_are_all_that_is_held(tier: Coded) -> None:
    """Walk the store's objects for tensors: each is in `tensors()`, once, under a kind that a report knows."""
    store = fill(tier, *numbers(203), (203,))
    found: dict[int, Tensor] = {}

    def walk(each: object) -> None:
        if isinstance(each, Tensor):
            found[id(each)] = each
        elif isinstance(each, dict):
            list(map(walk, each.values()))
        elif hasattr(each, "__dict__"):
            walk(vars(each))

    walk(store)
    told = list(store.tensors())
    assert {id(tensor) for _, _, tensor in told} == found.keys()
    assert len({name for name, _, _ in told}) == len(told)
    assert {kind for _, kind, _ in told} <= set(KINDS)


@every_tier
def test_rows_can_be_reordered_and_repeated(tier: Coded) -> None:
    keys, values = numbers(150, batch=3)
    store = fill(tier, keys, values, (100, 50))
    order = torch.tensor([2, 0, 0, 1])
    store.map(lambda tensor: tensor.index_select(0, order))
    more = numbers(64, batch=4, seed=5)
    store.put(*more, None)
    agree(store, tier, *(torch.cat([x[order], y], 2) for x, y in zip((keys, values), more, strict=True)), (100, 50, 64))


@every_tier
def test_rows_with_stores_of_their_own_attend_as_in_one_and_are_as_long_as_their_tokens(tier: Coded) -> None:
    """In turns, reordered, repeated, and brought together for kernels that read all rows at once."""
    pieces = (203, 1, 64)
    keys, values = numbers(sum(pieces))
    share = torch.tensor([[0.1, 0.9], [0.5, 0.0]])[..., None]
    keep = torch.rand(2, 2, sum(pieces), generator=torch.Generator().manual_seed(1)) < share
    keep[..., 203] = True
    ragged, start = RaggedStore(tier.open(0, keys, values)), 0
    for size in pieces:
        part = slice(start, start + size)
        ragged.put(keys[:, :, part], values[:, :, part], keep[:, :, part])
        start += size
    one = fill(tier, keys, values, pieces, keep)

    def same(order: Tensor) -> None:
        query = torch.randn(len(order), 2, 3, 64, generator=torch.Generator().manual_seed(2))
        fresh = (keys[order][:, :, :1], values[order][:, :, :1])
        assert torch.equal(ragged.length, one.length)
        right = one.attend(query, 0.2, None, fresh)
        for store in (ragged, ragged.padded()):
            found = store.attend(query, 0.2, None, fresh)
            assert torch.allclose(found.out, right.out, rtol=1e-4, atol=1e-4)
            assert torch.allclose(found.lse, right.lse, rtol=1e-4, atol=1e-4)

    same(torch.arange(2))
    assert sum(x.nbytes for _, kind, x in ragged.tensors() if kind != "learned") < 0.8 * sum(
        x.nbytes for _, kind, x in one.tensors() if kind != "learned"
    )
    order = torch.tensor([1, 0, 0])
    for store in (ragged, one):
        store.map(lambda tensor: tensor.index_select(0, order))
        more = numbers(33, batch=3, seed=5)
        store.put(*more, None)
    same(order)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("name", ["run2", "channel4", "token2"])
@pytest.mark.parametrize("own_rows", [False, True])
def test_numbers_without_a_range_are_refused_before_anything_is_written(
    name: str, side: str, bad: float, own_rows: bool
) -> None:
    keys, values = numbers(128)
    store = fill(TIERS[name], keys, values, (128,))
    if own_rows:
        store = RaggedStore(store.tier.open(0, keys, values))
        store.put(keys, values, None)
    before = [(each, tensor.clone()) for each, _, tensor in store.tensors()]
    new = {"keys": torch.randn(2, 2, 32, 64), "values": torch.randn(2, 2, 32, 64)}
    new[side][1, 0, 17, 3] = bad
    with pytest.raises(NotFinite, match=rf"the {side} to encode hold NaN, infinity"):
        store.put(new["keys"], new["values"], None)
    for (each, old), (_, _, now) in zip(before, store.tensors(), strict=True):
        assert torch.equal(old, now), each


@given(
    bits=st.sampled_from([1, 2, 4, 8]),
    channels=st.sampled_from([64, 80, 96, 128, 256]),
    heads=st.sampled_from([1, 2]),
    queries=st.sampled_from([1, 4, 7, 8]),
    key_form=st.sampled_from(["run", "group"]),
    value_form=st.sampled_from(["token", "whole", "run"]),
    window=st.integers(0, 40),
    pieces=st.lists(st.integers(1, 150), min_size=1, max_size=5),
)
def test_every_shape_is_attended_as_if_it_were_decoded(
    bits: int, channels: int, heads: int, queries: int, key_form: str, value_form: str, window: int, pieces: list[int]
) -> None:
    run = Uniform(bits=bits, axis="channel")
    forms = {"run": run, "whole": Uniform(bits=bits, axis="token"), "token": Uniform(bits=bits, axis="token", group=16)}
    keys_lane = Lane(run) if key_form == "run" else Lane(Uniform(bits=bits, axis="channel", group=32), 0, 64)
    tier = Coded(keys_lane, Lane(forms[value_form], window))
    keys, values = numbers(sum(pieces), channels, heads, 1)
    agree(fill(tier, keys, values, pieces), tier, keys, values, pieces, queries)


def test_a_lane_that_would_cut_a_group_is_refused() -> None:
    with pytest.raises(ValueError, match="flush must be a multiple of the codec's group of 32 tokens, got 48"):
        Lane(CODECS["channel2"], flush=48)
    with pytest.raises(ValueError, match="window must be at least 0 and flush at least 1, got -1 and 1"):
        Lane(CODECS["token2"], window=-1)


@pytest.mark.parametrize("channels", [48, 80, 96])
def test_a_group_of_the_whole_head_is_allowed_at_any_head_size(channels: int) -> None:
    tier = coded(Uniform(bits=2, axis="token", group=channels))
    keys, values = numbers(33, channels)
    agree(fill(tier, keys, values, (33,)), tier, keys, values, (33,))
