"""mosaic: the bits that are asked for are the bits that are stored."""

import pytest

from kvmosaic import methods


@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("bits", [4, 3, 2, 1.5, 1])
def test_the_codes_take_the_bits_that_were_asked_for(bits, channels):
    recipe = methods.parse(f"mosaic bits={bits}")
    (tier,) = recipe.tiers
    stored = recipe.projection.size(channels) if recipe.projection else channels
    sides = zip(tier.lanes(0), (stored, channels), strict=True)
    codes = [part for lane, width in sides for part in lane.codec.parts(width).values() if part.kind == "codes"]
    assert sum(part.width * part.bits for part in codes) == 2 * channels * bits


def test_bits_between_are_refused():
    with pytest.raises(ValueError, match=r"4, 3, 2, 1\.5 or 1, got 2\.5"):
        methods.parse("mosaic bits=2.5")
