"""Pictures for the vision tasks: tiles of 64x64 pixels with 4x4 cells, a handwritten digit or a coloured shape in each.

The digits are scikit-learn's (1,797 real ones of 8x8 pixels). 300 of them are held out: their indices lie in
`_held_out.json` (the first 300 of a permutation drawn once, seed 0), the models are trained on the other 1,497, and every
task draws from the held-out ones unless asked for the others.
"""

import functools
import json
import random
from collections.abc import Sequence
from importlib import resources
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

TILE = 64
CELLS = 4  # along a side of a tile
CELL = TILE // CELLS
NOISE = 0.05  # standard deviation of the pixels' noise; pixels are 0 to 1

Split = Literal["train", "held_out"]

COLOURS = {
    "red": (1.0, 0.3, 0.3),
    "green": (0.3, 1.0, 0.3),
    "blue": (0.4, 0.5, 1.0),
    "white": (1.0, 1.0, 1.0),
    "yellow": (1.0, 1.0, 0.3),
    "pink": (1.0, 0.4, 1.0),
}
SHAPES = ("circle", "square", "triangle", "plus")


class Tile(NamedTuple):
    """pixels: [64, 64, 3], 0 to 1, before the noise. cells: what each of the 16 cells shows, row by row."""

    pixels: NDArray[np.float64]
    cells: tuple[str, ...]

    def row(self, row: int) -> str:
        """The text of a row: " 1 2 3 4"."""
        return "".join(f" {cell}" for cell in self.cells[CELLS * row : CELLS * (row + 1)])


@functools.cache
def _handwriting() -> tuple[NDArray[np.float64], list[str]]:
    from sklearn.datasets import load_digits  # a second to import: only when a picture is drawn

    digits: Any = load_digits()
    return digits.images / 16.0, [str(digit) for digit in digits.target]


@functools.cache
def samples(split: Split) -> tuple[int, ...]:
    """Indices into scikit-learn's digits. Raises ValueError for a split that does not exist."""
    held_out = json.loads(resources.files(__package__).joinpath("_held_out.json").read_text())
    if split == "held_out":
        return tuple(held_out)
    if split == "train":
        return tuple(sorted(set(range(len(_handwriting()[1]))) - set(held_out)))
    raise ValueError(f"split must be 'train' or 'held_out', got {split!r}.")


def digit_tile(rng: random.Random, colour: str, split: Split) -> Tile:
    """16 handwritten digits of one colour on black."""
    return _written(rng.choices(samples(split), k=CELLS * CELLS), colour)


def single_digit_tile(rng: random.Random, colour: str, digit: int, cell: int, split: Split) -> Tile:
    """One handwritten digit, in one of the 16 cells, on black."""
    targets = _handwriting()[1]
    shown: list[int | None] = [None] * (CELLS * CELLS)
    shown[cell] = rng.choice([index for index in samples(split) if targets[index] == str(digit)])
    return _written(shown, colour)


def _written(shown: Sequence[int | None], colour: str) -> Tile:
    """The samples, row by row; None for an empty cell."""
    pixels, targets = _handwriting()
    drawn = np.stack([np.zeros((8, 8)) if index is None else pixels[index] for index in shown])
    grid = drawn.reshape(CELLS, CELLS, 8, 8).swapaxes(1, 2).reshape(CELLS * 8, CELLS * 8)
    grey = np.asarray(Image.fromarray(grid.astype(np.float32)).resize((TILE, TILE), Image.Resampling.BILINEAR))
    names = tuple("" if index is None else targets[index] for index in shown)
    return Tile(grey[..., None] * np.array(COLOURS[colour]), names)


def shape_tile(rng: random.Random, cells: Sequence[tuple[str, str]]) -> Tile:
    """Sixteen cells, row by row, each a (colour, shape) of slightly varying size and place."""
    picture = Image.new("RGB", (TILE, TILE))
    draw = ImageDraw.Draw(picture)
    for index, (colour, shape) in enumerate(cells):
        fill = tuple(round(255 * channel) for channel in COLOURS[colour])
        size = rng.randint(9, 12)
        left = index % CELLS * CELL + rng.randint(1, CELL - 2 - size)
        top = index // CELLS * CELL + rng.randint(1, CELL - 2 - size)
        right, bottom = left + size, top + size
        if shape == "circle":
            draw.ellipse((left, top, right, bottom), fill=fill)
        elif shape == "square":
            draw.rectangle((left, top, right, bottom), fill=fill)
        elif shape == "triangle":
            draw.polygon(((left, bottom), (right, bottom), ((left + right) // 2, top)), fill=fill)
        else:
            middle, centre = (left + right) // 2, (top + bottom) // 2
            draw.line((middle, top, middle, bottom), fill=fill, width=3)
            draw.line((left, centre, right, centre), fill=fill, width=3)
    return Tile(np.asarray(picture) / 255.0, tuple(shape for _, shape in cells))


def picture(rng: random.Random, tiles: Sequence[Tile]) -> Image.Image:
    """The tiles, row by row, in the squarest grid that they fill, with noise on every pixel."""
    rows = next(rows for rows in range(int(len(tiles) ** 0.5), 0, -1) if len(tiles) % rows == 0)
    grid = np.stack([tile.pixels for tile in tiles]).reshape(rows, -1, TILE, TILE, 3)
    pixels = grid.swapaxes(1, 2).reshape(rows * TILE, -1, 3)
    pixels = pixels + NOISE * np.random.default_rng(rng.getrandbits(64)).standard_normal(pixels.shape)
    return Image.fromarray((255 * pixels.clip(0, 1)).round().astype(np.uint8))


def cells(tiles: Sequence[Tile]) -> tuple[str, ...]:
    return tuple(cell for tile in tiles for cell in tile.cells)
