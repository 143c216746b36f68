"""The CUDA kernels' attention against the reference over the same bytes: emulated everywhere, on the GPU where there is one."""

import pytest
import torch

from kvmosaic.codecs import Exact, Rotated, Sphere, Uniform
from kvmosaic.kernels.attention import Affine, Partial, cuda, reference
from kvmosaic.stores import Coded, CodedStore, Lane


def per_run(bits: int) -> Lane:
    return Lane(Uniform(bits=bits, axis="channel"))


def sphere(bits: int, window: int = 0) -> tuple[Lane, Lane]:
    keys, values = (Rotated(Sphere(bits=bits, scale=scale)) for scale in ("unbiased", "least"))  # type: ignore[arg-type]
    return Lane(keys, window), Lane(values, window)


def kivi(bits: int, group: int | None) -> tuple[Lane, Lane]:
    keys = Lane(Uniform(bits=bits, axis="channel", group=group or 128), flush=128)
    return keys, Lane(Uniform(bits=bits, axis="token", group=group), window=128)


EQUALIZED = Lane(Uniform(bits=2, axis="token", equalize=True))

STORES: dict[str, tuple[Lane, Lane]] = {
    "exact": (Lane(Exact()), Lane(Exact())),
    **{f"runs {bits}": (per_run(bits), per_run(bits)) for bits in (1, 2, 4, 8)},
    "runs 4 and 1": (per_run(4), per_run(1)),
    "runs 1 and 8": (per_run(1), per_run(8)),
    "kivi 2": kivi(2, 32),
    "kivi 4, whole tokens": kivi(4, None),
    "zipcache": (per_run(2), EQUALIZED),
    "tokens": (Lane(Uniform(bits=4, axis="token"), 9), Lane(Uniform(bits=2, axis="token", group=16), 9)),
    "equalized keys": (
        Lane(Uniform(bits=2, axis="token", equalize=True), 5, 3),
        Lane(Uniform(bits=1, axis="token"), 5, 3),
    ),
    "mosaic 2": sphere(2, 32),
    "mosaic 1": sphere(1, 32),
    "turboquant 4": sphere(4),
}


def filled(
    lanes: tuple[Lane, Lane], device: torch.device, *, channels: int = 64, lengths: tuple[int, ...] = (150, 40, 1, 61),
    dtype: torch.dtype = torch.bfloat16, seed: int = 0,
) -> CodedStore:  # fmt: skip
    """A store that grew by ragged runs, one head of it with almost nothing; each channel has its own offset."""
    torch.manual_seed(seed)
    empty = torch.empty(2, 2, 0, channels, dtype=dtype, device=device)
    store = CodedStore(Coded(*lanes), empty, empty)
    offset = torch.randn(channels)
    for tokens in lengths:
        new = [(torch.randn(2, 2, tokens, channels) + offset).to(device, dtype) for _ in range(2)]
        keep = torch.rand(2, 2, tokens) < 0.8
        keep[0, 0] = tokens == 1
        store.put(new[0], new[1], keep.to(device))
    return store


def both(
    store: CodedStore, rows: int = 4, softcap: float | None = None, affine: Affine | None = None, fresh: int = 1
) -> tuple[Partial, Partial]:
    device, channels = store.length.device, store.keys.channels
    query = torch.randn(2, 2, rows, channels).to(device)
    new = None
    if fresh:  # as a model makes them: heads are transposed in, so tokens are not next to one another
        keys, values = torch.randn(2, 2, fresh, 2, channels).transpose(2, 3).to(device, store.keys.ring.dtype)
        new = (keys, values)
    arguments = (store.keys, store.values, store.length, query, channels**-0.5, softcap, affine, new)
    ours = cuda.attend(*arguments)
    assert ours is not None, "the kernels serve this store"
    return ours, reference.attend(*arguments)


def assert_alike(ours: Partial, expected: Partial, tolerance: float = 3e-4) -> None:
    """Within 3e-4 of what the values spread (the aim is 1e-3)."""
    assert torch.equal(ours.lse.isinf(), expected.lse.isinf())
    torch.testing.assert_close(ours.lse, expected.lse, rtol=0, atol=1e-3)
    assert (ours.out - expected.out).norm() <= tolerance * max(expected.out.norm(), expected.out.numel() ** 0.5 * 0.3)


@pytest.mark.parametrize("name", STORES)
def test_attention_is_the_references(name: str, gpu_device: torch.device) -> None:
    assert_alike(*both(filled(STORES[name], gpu_device)))


@pytest.mark.parametrize("channels", [80, 96, 128, 256])
@pytest.mark.parametrize("name", ["runs 1", "kivi 2"])
def test_every_head_size_is_served(name: str, channels: int, gpu_device: torch.device) -> None:
    if name == "kivi 2" and channels == 80:
        name = "kivi 4, whole tokens"  # groups of 32 channels do not divide 80
    assert_alike(*both(filled(STORES[name], gpu_device, channels=channels, lengths=(150, 20))))


@pytest.mark.parametrize("rows", [1, 7, 18])
def test_any_number_of_queries_may_share_a_head(rows: int, gpu_device: torch.device) -> None:
    assert_alike(*both(filled(STORES["runs 2"], gpu_device, lengths=(90,)), rows=rows))


def test_float16_models_are_served(gpu_device: torch.device) -> None:
    assert_alike(*both(filled(STORES["mosaic 2"], gpu_device, dtype=torch.float16)))


@pytest.mark.parametrize("affine", [Affine(), Affine(0.5, 2.0, official=True)])
def test_calibrated_logits_are_the_references(affine: Affine, gpu_device: torch.device) -> None:
    assert_alike(*both(filled(STORES["runs 2"], gpu_device), affine=affine))


def test_logits_are_capped(gpu_device: torch.device) -> None:
    assert_alike(*both(filled(STORES["kivi 2"], gpu_device), softcap=2.0))


@pytest.mark.parametrize("fresh", [0, 3])
def test_tokens_of_the_step_are_attended_if_there_are_any(fresh: int, gpu_device: torch.device) -> None:
    assert_alike(*both(filled(STORES["runs 2"], gpu_device, lengths=(1, 2)), fresh=fresh))


def test_exact_tokens_that_all_lie_in_a_window_are_attended(gpu_device: torch.device) -> None:
    assert_alike(*both(filled((Lane(Exact(), 40), Lane(Exact(), 40)), gpu_device, lengths=(30, 1))))
    behind = filled((Lane(Exact(), 4), Lane(Exact(), 4)), gpu_device, lengths=(30,))
    assert not cuda.serves(cuda.Source(behind.keys, behind.values, behind.length, None))


def test_an_empty_store_has_no_share(gpu_device: torch.device) -> None:
    ours, expected = both(filled(STORES["runs 2"], gpu_device, lengths=()), fresh=0)
    assert bool((ours.lse == -torch.inf).all()) and not bool(ours.out.any())
    assert_alike(ours, expected)


def test_what_lies_beyond_a_rows_tokens_is_never_read_as_one(gpu_device: torch.device) -> None:
    store = filled(STORES["tokens"], gpu_device)
    for lane in (store.keys, store.values):
        for name in ("scale", "low"):
            beyond = torch.arange(lane.buffers[name].shape[2], device=gpu_device) >= lane.coded[..., None]
            lane.buffers[name].masked_fill_(beyond[..., None], torch.nan)
        slot = torch.arange(lane.ring.shape[2], device=gpu_device)
        held = (slot - lane.coded[..., None]) % lane.lane.ring < (store.length - lane.coded)[..., None]
        lane.ring.masked_fill_(~held[..., None], torch.nan)
    ours, expected = both(store, fresh=0)
    assert bool(ours.out.isfinite().all())
    del expected  # the reference multiplies zeros with what lies there


def test_the_same_input_gives_the_same_bits(gpu_device: torch.device) -> None:
    store = filled(STORES["kivi 2"], gpu_device)
    query = torch.randn(2, 2, 4, 64).to(gpu_device)
    one, other = (cuda.attend(store.keys, store.values, store.length, query, 0.125, None, None, None) for _ in range(2))
    assert one is not None and other is not None
    assert torch.equal(one.out, other.out) and torch.equal(one.lse, other.lse)


def assert_nan_stays_in_its_row(store: CodedStore) -> None:
    query = torch.randn(2, 2, 4, 64).to(store.length.device)
    query[0, 1, 2, 5] = torch.nan
    part = cuda.attend(store.keys, store.values, store.length, query, 0.125, None, None, None)
    assert part is not None
    bad = part.out.isnan().any(-1)
    assert bool(bad[0, 1, 2]) and int(bad.sum()) == 1


def test_nan_in_a_query_stays_in_its_row(gpu_device: torch.device) -> None:
    assert_nan_stays_in_its_row(filled(STORES["runs 2"], gpu_device))


@pytest.mark.parametrize(
    ("lanes", "reason"),
    [
        ((Lane(Exact()), per_run(2)), "one side is exact"),
        ((Lane(Sphere(bits=3, scale="norm")), per_run(2)), "two planes"),
        ((per_run(2), Lane(Uniform(bits=2, axis="channel", group=32), flush=32)), "ranges of values by channel"),
        ((Lane(Rotated(Uniform(bits=2, axis="token"))), Lane(Uniform(bits=2, axis="token"))), "rotated differently"),
        ((Lane(Uniform(bits=2, axis="token"), 9), Lane(Uniform(bits=2, axis="token"))), "encoded before their keys"),
    ],
)
def test_what_is_not_served_is_named(lanes: tuple[Lane, Lane], reason: str) -> None:
    assert reason in (cuda.why_not(*lanes, 64) or "")
