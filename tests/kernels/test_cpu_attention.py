"""The compiled attention against the reference, for every variant that this CPU can run."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvmosaic.codecs import Codec, Exact, Rotated, Sphere, Uniform
from kvmosaic.kernels import native
from kvmosaic.kernels.attention import Affine, Partial, cpu, merge, reference
from kvmosaic.stores import Coded, CodedStore, Lane

VARIANTS = native.runnable()
pytestmark = pytest.mark.skipif(not VARIANTS, reason="the compiled kernels were not built")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def lanes(bits: int) -> list[Lane]:
    """Every form of lane that the kernels serve (head sizes are multiples of 32 where a group is)."""
    return [
        Lane(Uniform(bits=bits, axis="channel", group=32), flush=128),
        Lane(Uniform(bits=bits, axis="channel", group=96), window=5, flush=96),
        Lane(Uniform(bits=bits, axis="channel")),
        Lane(Uniform(bits=bits, axis="channel", clip=(0.9, 0.8), clip_about="center"), window=7, flush=3),
        Lane(Uniform(bits=bits, axis="token", group=32), window=40),
        Lane(Uniform(bits=bits, axis="token")),
        Lane(Uniform(bits=bits, axis="token", equalize=True), window=3, flush=2),
        Lane(Exact()),
        Lane(Rotated(Uniform(bits=bits, axis="token", group=32)), window=9),
        Lane(Rotated(Uniform(bits=bits, axis="channel", group=32)), flush=64),
    ]


def sphere_lanes(bits: int) -> list[Lane]:
    """And of lanes on the sphere's levels, at any head size."""
    return [
        Lane(Sphere(bits=bits, scale="norm")),
        Lane(Rotated(Sphere(bits=bits, scale="unbiased")), window=32),
        Lane(Rotated(Sphere(bits=bits, scale="least"), seed=3), window=5, flush=4),
    ]


def filled(
    keys: Lane, values: Lane, channels: int, lengths: list[int], batch: int, dtype: torch.dtype, seed: int
) -> CodedStore:
    """A store that grew by ragged runs; each channel has its own offset, as keys have."""
    torch.manual_seed(seed)
    empty = torch.empty(batch, 2, 0, channels, dtype=dtype)
    store = CodedStore(Coded(keys, values), empty, empty)
    offset = torch.randn(channels)
    for tokens in lengths:
        new = [(torch.randn(batch, 2, tokens, channels) + offset).to(dtype) for _ in range(2)]
        keep = torch.rand(batch, 2, tokens) < 0.8
        keep[0, 0] = tokens == 1  # a head with almost nothing, at times nothing
        store.put(new[0], new[1], keep)
    return store


def both(
    store: CodedStore,
    query: Tensor,
    softcap: float | None = None,
    affine: Affine | None = None,
    fresh: tuple[Tensor, Tensor] | None = None,
) -> tuple[Partial, Partial]:
    arguments = (store.keys, store.values, store.length, query, query.shape[3] ** -0.5, softcap, affine, fresh)
    ours = cpu.attend(*arguments)
    assert ours is not None, "the kernels serve this store"
    return ours, reference.attend(*arguments)


def assert_alike(ours: Partial, expected: Partial) -> None:
    """Within 1e-4 of what the values spread: rounding of weights is relative to numbers, not to their mean."""
    assert torch.equal(ours.lse.isinf(), expected.lse.isinf())
    torch.testing.assert_close(ours.lse, expected.lse, rtol=0, atol=4e-4)
    assert (ours.out - expected.out).norm() <= 1e-4 * max(expected.out.norm(), expected.out.numel() ** 0.5 * 0.3)


FORMS = st.sampled_from(
    [("lanes", bits, form) for bits in (1, 2, 4, 8) for form in range(10)]
    + [("sphere", bits, form) for bits in (1, 2, 3, 4) for form in range(3)]
)
CASES = st.fixed_dictionaries(
    {
        "keys": FORMS,
        "values": FORMS,
        "channels": st.sampled_from([32, 64, 96, 128, 256]),
        "lengths": st.lists(st.sampled_from([1, 2, 63, 128, 200, 301]), max_size=3),
        "batch": st.integers(1, 2),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        "rows": st.sampled_from([1, 3, 4, 7, 8, 18]),
        "softcap": st.sampled_from([None, None, 20.0]),
        "affine": st.sampled_from([None, None, Affine(), Affine(0.5, 2.0, official=True)]),
        "fresh": st.sampled_from([None, 1, 3]),
        "seed": st.integers(0, 99),
    }
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=CASES)
def test_attention_is_the_references(variant: str, case: dict) -> None:
    keys, values = (
        {"lanes": lanes, "sphere": sphere_lanes}[form](bits)[index]
        for form, bits, index in (case["keys"], case["values"])
    )
    store = filled(keys, values, case["channels"], case["lengths"], case["batch"], case["dtype"], case["seed"])
    query = torch.randn(case["batch"], 2, case["rows"], case["channels"])
    fresh = None
    if case["fresh"]:
        # as a model makes them: heads are transposed in, so tokens are not next to one another
        keys, values = (
            torch.randn(2, case["batch"], case["fresh"], 2, case["channels"]).transpose(2, 3).to(case["dtype"])
        )
        fresh = (keys, values)
    assert_alike(*both(store, query, case["softcap"], case["affine"], fresh))


@pytest.mark.parametrize("channels", [24, 80, 112])
@pytest.mark.parametrize(
    "codec",
    [
        *(Uniform(bits=1, axis="channel"), Uniform(bits=4, axis="token"), Exact()),
        *(Rotated(Sphere(bits=bits, scale="unbiased")) for bits in (1, 2, 3, 4)),
    ],
)
def test_head_sizes_need_not_fill_a_vector(variant: str, channels: int, codec: Codec) -> None:
    store = filled(Lane(codec, window=9), Lane(codec), channels, [150], 1, torch.bfloat16, 0)
    assert_alike(*both(store, torch.randn(1, 2, 4, channels)))


@pytest.mark.parametrize("channels", [48, 256])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_channel_groups_may_be_one_vector(variant: str, bits: int, channels: int) -> None:
    lane = Lane(Uniform(bits=bits, axis="token", group=16))
    store = filled(lane, lane, channels, [150], 1, torch.float32, 0)
    assert_alike(*both(store, torch.randn(1, 2, 7, channels)))


def test_many_rows_of_a_long_prompt_are_tiled(variant: str) -> None:
    store = filled(*[lanes(4)[0], lanes(4)[4]], 64, [500], 1, torch.float32, 1)
    assert_alike(*both(store, torch.randn(1, 2, 1003, 64)))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("count", [1, 2, 7])
def test_any_number_of_threads_gives_the_same_and_twice_the_same_bits(variant: str, count: int) -> None:
    store = filled(lanes(2)[0], lanes(2)[4], 128, [3000], 1, torch.bfloat16, 2)
    query = torch.randn(1, 2, 4, 128)
    torch.set_num_threads(count)
    first, expected = both(store, query)
    again, _ = both(store, query)
    assert_alike(first, expected)
    assert torch.equal(first.out, again.out) and torch.equal(first.lse, again.lse)


def test_cut_units_merge_with_calibrated_logits(variant: str) -> None:
    store = filled(lanes(2)[2], lanes(2)[2], 64, [2500], 1, torch.float32, 3)
    assert_alike(*both(store, torch.randn(1, 2, 3, 64), affine=Affine()))


def test_no_tokens_and_no_fresh_ones_give_nothing(variant: str) -> None:
    store = filled(lanes(4)[0], lanes(4)[4], 64, [], 2, torch.float32, 0)
    ours, _ = both(store, torch.randn(2, 2, 4, 64))
    assert not ours.out.any() and (ours.lse == -torch.inf).all()


def test_fresh_tokens_are_one_more_part_of_the_merge(variant: str) -> None:
    store = filled(lanes(8)[2], lanes(8)[5], 64, [100], 1, torch.float32, 4)
    query, fresh = torch.randn(1, 2, 4, 64), tuple(torch.randn(2, 1, 2, 3, 64))
    empty = filled(lanes(8)[2], lanes(8)[5], 64, [], 1, torch.float32, 4)
    parts = [both(store, query)[0], both(empty, query, fresh=fresh)[0]]
    assert_alike(both(store, query, fresh=fresh)[0], merge(parts))


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("form", [0, 4, 7])
def test_a_query_that_is_not_finite_gives_nan_in_its_row_and_nowhere_else(
    variant: str, form: int, number: float
) -> None:
    store = filled(lanes(4)[form], lanes(4)[4], 64, [200], 1, torch.float32, 5)
    query = torch.randn(1, 2, 5, 64)
    clean, _ = both(store, query)
    query[0, 1, 3, 7] = number
    ours, _ = both(store, query)
    assert ours.out[0, 1, 3].isnan().all() and ours.lse[0, 1, 3].isnan()
    others = torch.ones(1, 2, 5, dtype=torch.bool)
    others[0, 1, 3] = False
    assert torch.equal(ours.out[others], clean.out[others])


def test_a_dominant_token_with_a_small_scale_keeps_its_precision(variant: str) -> None:
    """Attention sinks: nearly all the weight on a token whose values are tiny beside the others'."""
    torch.manual_seed(0)
    keys, values = torch.randn(2, 1, 1, 300, 64)
    query = torch.randn(1, 1, 4, 64)
    keys[0, 0, 0] = query.mean(2)[0, 0] * 8
    values[0, 0, 0] *= 0.01
    store = CodedStore(Coded(lanes(8)[5], lanes(8)[5]), keys[:, :, :0], values[:, :, :0])
    store.put(keys, values, None)
    ours, expected = both(store, query)
    assert (ours.out - expected.out).norm() <= 1e-4 * expected.out.norm()


def test_lanes_without_a_compiled_form_go_to_the_reference(variant: str) -> None:
    store = filled(Lane(Uniform(bits=4, axis="token", group=4)), Lane(Exact()), 64, [50], 1, torch.float32, 0)
    assert cpu.attend(store.keys, store.values, store.length, torch.randn(1, 2, 1, 64), 1.0, None, None, None) is None
    assert store.attend(torch.randn(1, 2, 1, 64), 1.0, None).out.isfinite().all()


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda store, query: (store, query[..., :32]), "query must have the shape"),
        (lambda store, query: (store, query.double()), "query must be torch.float32"),
        (lambda store, query: (store, query.to("meta")), "query must be on the CPU"),
        (lambda store, query: (store, query[:, :1].expand(1, 3, 4, 64)), "query must have the shape"),
        (lambda store, query: (_with(store, "codes", lambda x: x[..., :-1]), query), "codes must have the shape"),
        (lambda store, query: (_with(store, "scale", lambda x: x.float()), query), "scale must be torch.float16"),
        (
            lambda store, query: (_with(store, "codes", lambda x: x.mT.contiguous().mT), query),
            "codes must be contiguous",
        ),
        (
            lambda store, query: (_with(store, "codes", lambda x: x[:, :, :1].contiguous()), query),
            "counts do not match",
        ),
        (lambda store, query: (_longer(store), query), "counts do not match"),
    ],
)
def test_bad_input_is_refused_before_c_reads_it(variant: str, damage, complaint: str) -> None:
    store, query = damage(filled(lanes(4)[5], lanes(4)[5], 64, [400], 1, torch.float32, 0), torch.randn(1, 2, 4, 64))
    with pytest.raises(ValueError, match=complaint):
        cpu.attend(store.keys, store.values, store.length, query, 1.0, None, None, None)


def _with(store: CodedStore, name: str, change) -> CodedStore:
    store.values.buffers[name] = change(store.values.buffers[name])
    return store


def _longer(store: CodedStore) -> CodedStore:
    store.length = store.length + 1
    return store


def test_forcing_a_variant_that_cannot_run_says_what_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMOSAIC_CPU", "sse9")
    native.kernels.cache_clear()
    with pytest.raises(ValueError, match=r"KVMOSAIC_CPU is 'sse9'.*plain, reference"):
        native.kernels()
    monkeypatch.setenv("KVMOSAIC_CPU", "reference")
    assert native.kernels().library is None
    monkeypatch.undo()
    native.kernels.cache_clear()


def test_without_the_library_the_reference_runs_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("KVMOSAIC_CPU", raising=False)
    monkeypatch.setattr(native, "_load", lambda: (None, "not built"))
    native.kernels.cache_clear()
    store = filled(lanes(4)[0], lanes(4)[4], 64, [200], 1, torch.float32, 0)
    for _ in range(3):
        assert store.attend(torch.randn(1, 2, 4, 64), 1.0, None).out.isfinite().all()
    assert [record.name for record in caplog.records] == ["kvmosaic"]
    assert "not built" in caplog.text
    native.kernels.cache_clear()
