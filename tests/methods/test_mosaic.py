"""mosaic: the bits that are asked for are the bits that are stored."""

import pytest

from kvmosaic import methods


@pytest.mark.parametrize("bits", [4, 3, 2, 1.5, 1])
def test_the_codes_take_the_bits_that_were_asked_for(bits):
    (tier,) = methods.parse(f"mosaic bits={bits}").tiers
    codes = [part for lane in tier.lanes(0) for part in lane.codec.parts(64).values() if part.kind == "codes"]
    assert sum(part.width * part.bits for part in codes) == 2 * 64 * bits


def test_bits_between_are_refused():
    with pytest.raises(ValueError, match=r"4, 3, 2, 1\.5 or 1, got 2\.5"):
        methods.parse("mosaic bits=2.5")
