"""The compiled encoder writes what the codec writes, bit by bit, for every variant that this CPU can run."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmosaic.codecs import Codec, Rotated, Sphere, Uniform
from kvmosaic.kernels import native
from kvmosaic.kernels.encode import cpu
from kvmosaic.stores import Lane, LaneBytes

VARIANTS = native.runnable()
pytestmark = pytest.mark.skipif(not VARIANTS, reason="the compiled kernels were not built")

FORMS = [
    ({"axis": "channel", "group": 32}, 32),
    ({"axis": "channel", "group": 64, "clip": (0.8, 0.7), "clip_about": "center"}, 128),
    ({"axis": "channel", "group": 96, "clip": 0.9}, 96),
    ({"axis": "channel", "clip": (1.0, 0.6)}, 1),
    ({"axis": "token"}, 1),
    ({"axis": "token", "group": 32, "clip": 0.9, "clip_about": "center"}, 1),
    ({"axis": "token", "equalize": True, "clip": 0.95}, 5),
]


CASES = st.fixed_dictionaries(
    {
        "form": st.sampled_from(FORMS),
        "bits": st.sampled_from([1, 2, 4, 8]),
        "role": st.sampled_from(["keys", "values"]),
        "channels": st.sampled_from([32, 64, 96, 128, 256]),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        "lengths": st.lists(st.sampled_from([1, 2, 70, 128, 301]), min_size=1, max_size=4),
        "window": st.sampled_from([0, 0, 9]),
        "seed": st.integers(0, 99),
    }
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=CASES)
def test_every_byte_is_the_codecs(variant: str, case: dict) -> None:
    torch.manual_seed(case["seed"])
    (form, flush), channels = case["form"], case["channels"]
    lane = Lane(Uniform(bits=case["bits"], **form), window=case["window"], flush=flush)
    empty = torch.empty(2, 2, 0, channels, dtype=case["dtype"])
    compiled, codec = LaneBytes(lane, case["role"], empty), LaneBytes(lane, case["role"], empty)
    length = torch.zeros(2, 2, dtype=torch.int64)
    for tokens in case["lengths"]:
        x = (torch.randn(2, 2, tokens, channels) * 3).to(case["dtype"])
        x[0, 0, :, :5] = 0.25  # groups of equal numbers
        count = torch.randint(0, tokens + 1, (2, 2))
        count[0, 1], count[1, 1] = tokens, 0
        compiled.put(x, count, length)
        with pytest.MonkeyPatch.context() as only:
            only.setattr(cpu, "write", lambda *_: False)
            codec.put(x, count, length)
        length = length + count
    assert torch.equal(compiled.coded, codec.coded)
    for name, buffer in codec.buffers.items():
        assert torch.equal(compiled.buffers[name], buffer), name


@pytest.mark.parametrize("scale", ["norm", "matched", "unbiased", "least"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [24, 64, 80, 128, 256])
def test_numbers_of_a_rotated_sphere_are_the_codecs(variant: str, channels: int, bits: int, scale: str) -> None:
    """Sums over a token come in another order, so a number beside an edge between two levels may fall to either."""
    torch.manual_seed(bits)
    _agree(Rotated(Sphere(bits=bits, scale=scale), seed=5), channels, 3 if scale == "norm" else 0)


@pytest.mark.parametrize("codec", [Uniform(bits=4, axis="token"), Uniform(bits=2, axis="channel", group=32)])
def test_numbers_of_rotated_ranges_are_the_codecs(variant: str, codec: Codec) -> None:
    torch.manual_seed(0)
    _agree(Rotated(codec), 64, 0)


def _agree(codec: Codec, channels: int, window: int) -> None:
    lane = Lane(codec, window, 4 * codec.unit)
    empty = torch.empty(1, 2, 0, channels)
    compiled, reference = LaneBytes(lane, "keys", empty), LaneBytes(lane, "keys", empty)
    length = torch.zeros(1, 2, dtype=torch.int64)
    for tokens in (1, 70, 301):
        x = torch.randn(1, 2, tokens, channels)
        x[0, 0, 0] = 0
        compiled.put(x, None, length)
        with pytest.MonkeyPatch.context() as only:
            only.setattr(cpu, "write", lambda *_: False)
            reference.put(x, None, length)
        length = length + tokens
    ours, expected = (codec.decode(each.read(0, int(each.coded.max()))) for each in (compiled, reference))
    apart = (ours - expected).norm(dim=-1) > 2e-3 * expected.norm(dim=-1)
    assert apart.float().mean() < 0.01
    assert (ours - expected).norm() < 0.02 * expected.norm()


def test_tokens_that_lie_apart_are_read_where_they_lie(variant: str) -> None:
    lane = Lane(Uniform(bits=4, axis="token"))
    x = torch.randn(1, 300, 2, 64).transpose(1, 2)  # as a model hands its keys over
    count = torch.full((1, 2), 300)
    apart, together = (LaneBytes(lane, "values", x) for _ in range(2))
    apart.put(x, count, torch.zeros_like(count))
    together.put(x.contiguous(), count, torch.zeros_like(count))
    assert torch.equal(apart.buffers["codes"], together.buffers["codes"])


@pytest.mark.parametrize(
    ("x", "count", "complaint"),
    [
        (torch.randn(1, 2, 9, 32), torch.full((1, 2), 9), "the tokens to encode must have the shape"),
        (torch.randn(1, 2, 9, 64).double(), torch.full((1, 2), 9), "the tokens to encode must be float32"),
        (torch.randn(1, 2, 9, 64), torch.full((1, 2), 9, dtype=torch.int32), "count must be torch.int64"),
        (torch.randn(1, 2, 9, 64), torch.full((1, 2), 10), "count asks for 10 tokens"),
        (torch.randn(1, 2, 999, 64), torch.full((1, 2), 999), "do not match the store's buffers"),
    ],
)
def test_bad_input_is_refused_before_c_reads_it(variant: str, x, count, complaint: str) -> None:
    lane = LaneBytes(Lane(Uniform(bits=4, axis="token")), "values", torch.empty(1, 2, 0, 64))
    with pytest.raises(ValueError, match=complaint):
        cpu.write(lane, x, count)
