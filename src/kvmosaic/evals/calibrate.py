"""What CalibQuant learns for a model: how far to shrink ranges and by how much to lower logits, in each layer.

The measure is the divergence of the next-token distributions behind the compressed cache from those behind the exact
one, on turns that follow pictures. First one setting is searched for the whole model, coordinate by coordinate, then each
layer's is moved from there. What was searched on some pictures is kept only if it is better on the others, too.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from kvmosaic import methods
from kvmosaic.calibration import Calibration
from kvmosaic.errors import UnsupportedModel
from kvmosaic.evals import harness, tasks
from kvmosaic.evals.example import Example, Question
from kvmosaic.hooks import Cache, models
from kvmosaic.hooks.layer import CacheLayer
from kvmosaic.hooks.pending import Pending
from kvmosaic.loading import Opened
from kvmosaic.recipe import Recipe

About = Literal["zero", "center"]

CLIPS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
OFFSETS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)  # the paper searches 0 to 3
NEIGHBOURS = {"key_clip": (0.8, 0.9, 1.1, 1.25), "value_clip": (0.8, 0.9, 1.1, 1.25), "high": (-0.5, 0.5)}
"""Factors of the clips, and steps of the offset, that are tried in each layer."""


class Setting(NamedTuple):
    """Of one layer: what `calibquant` takes under the same names."""

    key_clip: float
    value_clip: float
    low: float = 0.0
    high: float = 0.0


@dataclass(frozen=True)
class Bits:
    keys: int
    values: int
    about: About = "zero"

    def recipe(self, setting: Setting) -> Recipe:
        return methods.get("calibquant")(
            key_bits=self.keys,
            value_bits=self.values,
            clip_about=self.about,
            calibrated=bool(setting.low or setting.high),
            **setting._asdict(),
        )

    @property
    def released(self) -> Setting:
        """Where the search starts."""
        return Setting(0.5 if self.keys == 1 else 1.0, 0.3 if self.values == 1 else 1.0)


@dataclass
class Sample:
    """A context in the exact cache, and turns [N, T] that follow it.

    predicted: the first position whose next token counts. exact: [N, T - predicted, vocabulary], log-probabilities.
    encoded: layers, by index, bits and setting; made when first asked for.
    """

    keys: list[Tensor]
    values: list[Tensor]
    visual: Tensor
    turns: Tensor
    predicted: int
    exact: Tensor
    encoded: dict[tuple[int, Bits, Setting], CacheLayer] = field(default_factory=dict)

    def layer(self, index: int, bits: Bits, setting: Setting) -> CacheLayer:
        """A copy of the layer's cache, ready for the turns."""
        key = (index, bits, setting)
        if key not in self.encoded:
            keys, values = self.keys[index], self.values[index]
            layer = CacheLayer(index, len(self.keys), bits.recipe(setting))
            layer.lazy_initialization(keys, values)
            layer.seen = keys.shape[2]
            layer.store(Pending(keys, values, self.visual))
            layer.batch_repeat_interleave(len(self.turns))
            self.encoded[key] = layer
        return copy.deepcopy(self.encoded[key])


@dataclass(frozen=True)
class Found:
    """settings: one for each layer. searched, held_out: divergence in nats a token, on the two parts of the sample."""

    stage: str
    bits: Bits
    settings: tuple[Setting, ...]
    searched: float
    held_out: float


@torch.inference_mode()
def samples(opened: Opened, examples: Sequence[Example]) -> list[Sample]:
    """Each example's context and its answers, word for word, as turns; those of the most frequent length."""
    kinds = {kind for kind, _ in models.layer_types(opened.model.config)}
    if kinds != {"full_attention"}:
        raise UnsupportedModel(
            f"calibration needs attention over the whole context in every layer, got {', '.join(sorted(kinds))}"
        )
    made = []
    ids_of = torch.tensor(models.visual_ids(opened.model.config), device=opened.model.device)
    for example in examples:
        cache, start = harness.prefill(opened, Recipe(), example)
        seen = opened.inputs(example.context, example.images)["input_ids"][:, : cache.get_seq_length()]
        prompts = [
            torch.cat([start, opened.ids(each.prompt)], 1) if each.prompt else start for each in example.questions
        ]
        turns = [
            torch.cat([prompt, opened.ids(each.answer)], 1)
            for prompt, each in zip(prompts, example.questions, strict=True)
        ]
        shapes = [(prompt.shape[1], turn.shape[1]) for prompt, turn in zip(prompts, turns, strict=True)]
        shape = max(set(shapes), key=shapes.count)
        rows = torch.cat([turn for turn, each in zip(turns, shapes, strict=True) if each == shape])
        keys, values = ([getattr(layer, side) for layer in cache.layers] for side in ("keys", "values"))
        full = copy.deepcopy(cache)
        full.batch_repeat_interleave(len(rows))
        exact = _logits(opened, full, rows, shape[0] - 1)
        made.append(Sample(keys, values, torch.isin(seen, ids_of), rows, shape[0] - 1, exact))
    return made


@torch.inference_mode()
def divergence(opened: Opened, parts: Sequence[Sample], bits: Bits, settings: Sequence[Setting]) -> float:
    """Mean over tokens of KL(exact, compressed), in nats."""
    total = count = 0.0
    for sample in parts:
        cache = Cache(opened.model, bits.recipe(settings[0]))
        cache.layers = [sample.layer(index, bits, setting) for index, setting in enumerate(settings)]
        got = _logits(opened, cache, sample.turns, sample.predicted)
        each = (sample.exact.exp() * (sample.exact - got)).sum(-1)
        total, count = total + float(each.sum()), count + each.numel()
    return total / count


def search(
    opened: Opened,
    parts: Sequence[Sample],
    key_bits: int,
    value_bits: int,
    *,
    per_layer: bool = True,
    tick: Callable[[str], None] = lambda stage: None,
) -> Iterator[Found]:
    """What was found, stage by stage; the last is to be kept. Two thirds of `parts` are searched on.

    tick: called at each divergence that is measured.
    """
    if len(parts) < 2:
        raise ValueError(f"calibration needs 2 pictures at least (one to search on, one to check), got {len(parts)}")
    cut = max(1, len(parts) * 2 // 3)
    layers = len(parts[0].keys)

    def measure(stage: str, bits: Bits, settings: Sequence[Setting], on: Sequence[Sample] = parts[:cut]) -> float:
        tick(stage)
        return divergence(opened, on, bits, settings)

    def found(stage: str, bits: Bits, settings: Sequence[Setting]) -> Found:
        both = (measure(stage, bits, settings, on) for on in (parts[:cut], parts[cut:]))
        return Found(stage, bits, tuple(settings), *both)

    def whole_model(bits: Bits, setting: Setting) -> float:
        return measure("whole model", bits, [setting] * layers)

    start = Bits(key_bits, value_bits)
    best = found("released", start, [start.released] * layers)
    yield best
    for about in ("zero", "center"):
        bits = replace(start, about=about)
        setting = _descend(bits.released, functools.partial(whole_model, bits))
        candidate = found(f"whole model, about {about}", bits, [setting] * layers)
        yield candidate
        best = min(best, candidate, key=lambda each: each.held_out)
    if per_layer:
        candidate = _by_layer(best, lambda settings: measure("per layer", best.bits, settings))
        candidate = found("per layer", candidate.bits, candidate.settings)
        yield candidate
        best = min(best, candidate, key=lambda each: each.held_out)
    yield replace(best, stage=f"kept: {best.stage}")


def _descend(setting: Setting, measure: Callable[[Setting], float]) -> Setting:
    """Coordinate by coordinate over the grid, until a round changes nothing, three rounds at most."""
    grid = {"key_clip": CLIPS, "high": OFFSETS, "value_clip": CLIPS, "low": OFFSETS}
    known = {setting: measure(setting)}
    for _ in range(3):
        before = setting
        for name, values in grid.items():
            for value in values:
                each = setting._replace(**{name: value})
                if each not in known and each.low <= each.high:
                    known[each] = measure(each)
            setting = min(known, key=known.__getitem__)
        if setting == before:
            break
    return setting


def _by_layer(best: Found, measure: Callable[[Sequence[Setting]], float]) -> Found:
    """Each layer's setting to its neighbours, one round over all layers, the last first."""
    settings, least = list(best.settings), best.searched
    for layer in reversed(range(len(settings))):
        for name, moves in NEIGHBOURS.items():
            old = settings[layer]
            value = getattr(old, name)
            for move in moves:
                moved = max(old.low, value + move) if name == "high" else min(1.0, value * move)
                tried = [*settings[:layer], old._replace(**{name: moved}), *settings[layer + 1 :]]
                if moved != value and (got := measure(tried)) < least:
                    least, settings = got, tried
    return replace(best, settings=tuple(settings), searched=least)


def generated(pictures: int, seed: int, questions: int = 12) -> list[Example]:
    """For the bundled model: pictures of digits that it was trained on, so that no test sees them."""
    rng = random.Random(f"calibration {seed}")
    return [tasks.generator("rows")(rng, questions=questions, split="train") for _ in range(pictures)]


def described(opened: Opened, pictures: Sequence[Image.Image], prompt: str, tokens: int) -> Iterator[Example]:
    """For a user's pictures: the prompt and what the model itself replies behind the exact cache."""
    for picture in pictures:
        context = opened.chat(prompt, [picture])
        example = Example(context, (Question("", ""),), (picture,))
        cache, start = harness.prefill(opened, Recipe(), example)
        (reply,), _ = harness.answer(opened, cache, [start], [tokens])
        yield Example(context, (Question("", opened.tokenizer.decode(reply)),), (picture,))


def result(opened: Opened, found: Found, examples: Sequence[Example]) -> Calibration:
    """What `calibquant(calibration=FILE)` reads."""
    digest = hashlib.sha256()
    for example in examples:
        words = itertools.chain.from_iterable((each.prompt, each.answer) for each in example.questions)
        digest.update("\0".join([example.context, *words]).encode())
        for image in example.images:
            digest.update(image.tobytes())
    return Calibration(
        method="calibquant",
        options={
            "key_bits": found.bits.keys,
            "value_bits": found.bits.values,
            "clip_about": found.bits.about,
        },
        fingerprint=models.fingerprint(opened.model.config),
        data=digest.hexdigest(),
        tensors={
            name: torch.tensor([getattr(setting, name) for setting in found.settings]) for name in Setting._fields
        },
    )


def _logits(opened: Opened, cache: Cache, turns: Tensor, first: int) -> Tensor:
    """Log-probabilities of the tokens after `first`, ... but the last."""
    logits = opened.model(input_ids=turns, past_key_values=cache).logits[:, first:-1]
    return logits.float().log_softmax(-1)
