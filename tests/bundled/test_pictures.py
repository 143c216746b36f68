"""How pictures become tiles and placeholders."""

import numpy as np
import pytest
import torch
from PIL import Image

from kvmosaic import bundled
from kvmosaic.bundled import pictures
from kvmosaic.errors import BadPicture


def flat(width: int, height: int, value: int = 0) -> Image.Image:
    return Image.new("RGB", (width, height), (value, value, value))


def test_tiles_lie_row_by_row() -> None:
    pixels = np.zeros((128, 192, 3), dtype=np.uint8)
    for tile in range(6):
        row, column = divmod(tile, 3)
        pixels[64 * row : 64 * row + 64, 64 * column : 64 * column + 64] = 51 * tile
    tiles = pictures.prepare([Image.fromarray(pixels)])
    assert tiles.shape == (6, 3, 64, 64)
    assert torch.allclose(tiles.mean((1, 2, 3)), torch.linspace(-1, 1, 6))


def test_pixels_are_between_minus_one_and_one() -> None:
    assert pictures.prepare([flat(64, 64, 0)]).unique().tolist() == [-1]
    assert pictures.prepare([flat(64, 64, 255)]).unique().tolist() == [1]


@pytest.mark.parametrize(
    ("size", "grid"),
    [((64, 64), (1, 1)), ((1, 1), (1, 1)), ((100, 64), (1, 2)), ((95, 200), (3, 1)), ((640, 10), (1, 10))],
)
def test_other_sizes_are_resized_to_the_nearest_grid(size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert pictures.grid(flat(*size)) == grid
    assert len(pictures.prepare([flat(*size)])) == grid[0] * grid[1]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_every_mode_of_picture_is_taken(mode: str) -> None:
    assert pictures.prepare([flat(64, 64).convert(mode)]).shape == (1, 3, 64, 64)


def test_no_pictures_are_no_tiles() -> None:
    assert pictures.prepare([]).shape == (0, 3, 64, 64)
    assert pictures.expand("hello", []) == "hello"


def test_a_marker_becomes_sixteen_placeholders_a_numbered_tile() -> None:
    text = pictures.expand("a <image>b <image>c", [flat(128, 64), flat(64, 64)])
    assert text == f"a tile 0 {'<image>' * 16}tile 1 {'<image>' * 16}b tile 2 {'<image>' * 16}c"


def test_placeholders_are_as_many_as_the_model_makes_features() -> None:
    _, tokenizer = bundled.load("mosaic-vlm")
    inputs = pictures.inputs(tokenizer, "<image>\nrow 0 of tile 0:", [flat(128, 128)])
    assert int((inputs["input_ids"] == 2047).sum()) == 16 * len(inputs["pixel_values"])


@pytest.mark.parametrize(("text", "count"), [("no marker", 1), ("<image>", 0), ("<image><image>", 1)])
def test_pictures_without_markers_are_refused(text: str, count: int) -> None:
    with pytest.raises(BadPicture, match=f"markers for {count} pictures"):
        pictures.expand(text, [flat(64, 64)] * count)
