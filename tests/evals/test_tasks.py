"""What every generated task promises, and a solver of its own for each: answers follow from what the model is shown."""

import random
import re
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from kvmosaic.evals import tasks
from kvmosaic.evals.example import PICTURE, Example
from kvmosaic.evals.tasks import _tiles

SMALL = {"lines": {"lines": 12}, "needle": {"sentences": 9}, "track": {"assignments": 25}, "arithmetic": {"steps": 5}}
PICTURE_TASKS = ("rows", "cells", "transcribe", "colours", "count", "shapes", "pictures", "frames")
DIGIT_TASKS = ("rows", "cells", "transcribe", "colours", "count", "pictures", "frames")


def make(task: str, seed: int = 0, **options: object) -> Example:
    return tasks.generator(task)(random.Random(seed), **{**SMALL.get(task, {}), **options})


def number(text: str) -> list[int]:
    return [int(found) for found in re.findall(r"\d+", text)]


def solve_lines(example: Example, prompt: str) -> str:
    key = prompt.removeprefix("ask ")
    (line,) = (line for line in example.context.splitlines() if line.startswith(f"line {key} "))
    return " " + line.split(": ")[1] + "\n"


def solve_needle(example: Example, prompt: str) -> str:
    found = re.findall(rf"The {prompt.removesuffix(':')} is (\d+)\.", example.context)
    assert len(found) == 1
    return f" {found[0]}\n"


def solve_track(example: Example, prompt: str) -> str:
    values: dict[str, str] = {}
    for name, source in re.findall(r"set (\w+) = (\w+)", example.context):
        values[name] = values.get(source, source)
    return f" {values[prompt[4:-1]]}\n"


def solve_frequent(example: Example, prompt: str) -> str:
    (word, most), (_, second) = Counter(example.context.split()[1:]).most_common(2)
    assert most > second
    return f" {word}\n"


def solve_arithmetic(example: Example, prompt: str) -> str:
    value, *operations = re.findall(r"(?:[+-] )?\d+", example.context.split(": ")[1])
    written, current = "", int(value)
    for step, operation in enumerate(operations, start=1):
        result = (current + int(operation.replace(" ", ""))) % 1000
        written += f"step {step}: {current} {operation} = {result}\n"
        current = result
    return written.removeprefix(prompt) + f"result {current}\n"


def solve_copy(example: Example, prompt: str) -> str:
    return " " + example.context.removeprefix("Copy.\n")


def tile(example: Example, index: int) -> tuple[str, ...]:
    return example.cells[16 * index : 16 * index + 16]


def solve_rows(example: Example, prompt: str) -> str:
    row, index = number(prompt)
    return "".join(f" {cell}" for cell in tile(example, index)[4 * row : 4 * row + 4])


def solve_cells(example: Example, prompt: str) -> str:
    row, column, index = number(prompt)
    return f" {tile(example, index)[4 * row + column]}"


def solve_transcribe(example: Example, prompt: str) -> str:
    return "".join(f" {cell}" for cell in tile(example, *number(prompt)))


def solve_count(example: Example, prompt: str) -> str:
    digit, index = number(prompt)
    return f" {tile(example, index).count(str(digit))}"


def colour_seen(pixels: np.ndarray) -> str:
    """The colour whose direction the brightest pixels have."""
    bright = pixels.reshape(-1, 3)[pixels.sum(-1).ravel() >= np.quantile(pixels.sum(-1), 0.9)].mean(0)
    names = list(_tiles.COLOURS)
    table = np.array([_tiles.COLOURS[name] for name in names])
    table = table / np.linalg.norm(table, axis=1, keepdims=True)
    return names[int((table @ bright).argmax())]


def pixels_of(example: Example, image: int, index: int) -> np.ndarray:
    pixels = np.asarray(example.images[image], dtype=float)
    rows, columns = pixels.shape[0] // 64, pixels.shape[1] // 64
    return pixels.reshape(rows, 64, columns, 64, 3).swapaxes(1, 2).reshape(-1, 64, 64, 3)[index]


def solve_colours(example: Example, prompt: str) -> str:
    return f" {colour_seen(pixels_of(example, 0, *number(prompt)))}"


def cell_pixels(pixels: np.ndarray, cell: int) -> np.ndarray:
    return pixels.reshape(4, 16, 4, 16, 3).swapaxes(1, 2).reshape(16, 16, 16, 3)[cell]


def solve_shapes(example: Example, prompt: str) -> str:
    row, column, index = number(prompt)
    colour = colour_seen(cell_pixels(pixels_of(example, 0, index), 4 * row + column))
    return f" {colour} {tile(example, index)[4 * row + column]}"


def solve_pictures(example: Example, prompt: str) -> str:
    if "row" in prompt:
        return solve_rows(example, prompt)
    seen = [colour_seen(np.asarray(image, dtype=float)) for image in example.images]
    return f" {seen.index(prompt.split()[-1][:-1])}"


def solve_frames(example: Example, prompt: str) -> str:
    places = [next(cell for cell in range(16) if tile(example, frame)[cell]) for frame in range(len(example.images))]
    if "digit" in prompt:
        (frame,) = number(prompt)
        return f" {tile(example, frame)[places[frame]]}"
    looks = [
        f"{colour_seen(cell_pixels(pixels_of(example, frame, 0), place))} {tile(example, frame)[place]}"
        for frame, place in enumerate(places)
    ]
    return f" {looks.index(prompt.removeprefix(chr(10) + 'frame with ')[:-1])}"


SOLVERS: dict[str, Callable[[Example, str], str]] = {
    name.removeprefix("solve_"): solve for name, solve in list(globals().items()) if name.startswith("solve_")
}


@pytest.mark.parametrize("task", tasks.NAMES)
@pytest.mark.parametrize("seed", range(5))
def test_answers_follow_from_what_is_shown(task: str, seed: int) -> None:
    example = make(task, seed)
    assert example.questions
    for question in example.questions:
        assert question.answer == SOLVERS[task](example, question.prompt)


@pytest.mark.parametrize("task", ["pictures", "frames"])
def test_which_asks_for_the_number_of_what_is_shown(task: str) -> None:
    example = make(task, ask="which")
    for question in example.questions:
        assert question.answer == SOLVERS[task](example, question.prompt)
        assert question.answer in {f" {index}" for index in range(len(example.images))}


@pytest.mark.parametrize("task", tasks.NAMES)
def test_a_seed_makes_the_same_example_again(task: str) -> None:
    first, second = make(task, 3), make(task, 3)
    assert (first.context, first.questions, first.cells) == (second.context, second.questions, second.cells)
    assert [image.tobytes() for image in first.images] == [image.tobytes() for image in second.images]


@pytest.mark.parametrize("task", tasks.NAMES)
def test_another_seed_makes_another_example(task: str) -> None:
    first, second = make(task, 3), make(task, 4)
    assert first.context != second.context or first.images[0].tobytes() != second.images[0].tobytes()


@pytest.mark.parametrize("task", tasks.NAMES)
def test_every_picture_has_its_marker_and_every_tile_its_cells(task: str) -> None:
    example = make(task)
    assert example.context.count(PICTURE) == len(example.images)
    assert len(example.cells) == sum(image.width * image.height for image in example.images) // 256
    assert bool(example.images) == (task in PICTURE_TASKS)


@pytest.mark.parametrize("task", tasks.NAMES)
def test_no_question_is_asked_twice(task: str) -> None:
    prompts = [question.prompt for question in make(task).questions]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("task", sorted(set(tasks.NAMES) - {"arithmetic", "copy", "frequent"}))
@pytest.mark.parametrize("questions", [1, 3])
def test_as_many_questions_as_asked_for(task: str, questions: int) -> None:
    assert len(make(task, questions=questions).questions) == questions


@pytest.mark.parametrize(
    ("task", "options", "count"),
    [
        ("lines", {"lines": 7}, lambda example: example.context.count("line ")),
        ("needle", {"sentences": 6, "needles": 1}, lambda example: example.context.count(".\n") - 1),
        ("track", {"assignments": 7}, lambda example: example.context.count("set ")),
        ("arithmetic", {"steps": 7}, lambda example: example.questions[0].answer.count("=")),
        ("copy", {"words": 7}, lambda example: len(example.questions[0].answer.split())),
        ("frequent", {"words": 20, "distinct": 7}, lambda example: len(set(example.context.split())) - 1),
        ("rows", {"tiles": 7}, lambda example: len(example.cells) // 16),
        ("frames", {"frames": 7}, lambda example: len(example.images)),
        ("pictures", {"pictures": 3, "tiles": 7}, lambda example: len(example.cells) // 16 // 3),
    ],
)
def test_length_options_are_lengths(task: str, options: dict[str, int], count: Callable[[Example], int]) -> None:
    assert count(make(task, **options)) == 7


@pytest.mark.parametrize("lead", [1, 3])
def test_the_most_frequent_word_leads_by_at_least_the_lead(lead: int) -> None:
    for seed in range(20):
        words = make("frequent", seed, words=31, distinct=5, lead=lead).context.split()[1:]
        (_, most), (_, second) = Counter(words).most_common(2)
        assert len(words) == 31
        assert most - second >= lead


def test_training_never_sees_held_out_digits() -> None:
    train, held_out = set(_tiles.samples("train")), set(_tiles.samples("held_out"))
    assert not train & held_out
    assert len(held_out) == 300
    assert train | held_out == set(range(1797))


@pytest.mark.parametrize("task", DIGIT_TASKS)
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_tasks_draw_from_the_split_asked_for(task: str, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    samples = _tiles.samples
    monkeypatch.setattr(_tiles, "samples", lambda split: asked.append(split) or samples(split))
    make(task, split=split)
    assert set(asked) == {split}


def test_handwriting_is_held_out_unless_asked_otherwise() -> None:
    assert make("rows", 5).images[0].tobytes() == make("rows", 5, split="held_out").images[0].tobytes()
    assert make("rows", 5).images[0].tobytes() != make("rows", 5, split="train").images[0].tobytes()


def test_an_unknown_task_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"no task .line.\. Did you mean .lines."):
        tasks.generator("line")


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("lines", {"lines": 5000}, "lines must be 1 to"),
        ("lines", {"words": 3}, "words must be 1 to 2"),
        ("frequent", {"words": 5, "distinct": 8}, "words must be"),
        ("rows", {"tiles": 0}, "tiles must be"),
        ("rows", {"split": "test"}, "split must be 'train' or 'held_out', got 'test'"),
        ("frames", {"ask": "when"}, "ask must be 'read' or 'which', got 'when'"),
        ("pictures", {"pictures": 7}, "pictures must be 1 to 6"),
        ("frames", {"frames": 61}, "frames must be 1 to 60"),
    ],
)
def test_impossible_options_are_refused(task: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(task, **options)


def test_a_question_can_end_the_context() -> None:
    example = tasks.generator("lines")(random.Random(0), lines=7, within=True)
    *_, last = example.context.splitlines()
    (question,) = example.questions
    assert last.startswith("ask ") and last.endswith(":") and question.prompt == ""
    assert solve_lines(example, last) == question.answer
