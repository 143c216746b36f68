"""Calibration files of the tiny models: made once a process, when first asked for."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch

from kvmosaic.evals.learn import Passage, learn, settings
from kvmosaic.loading import Opened
from tests import models
from tests.models import Row, prompt


def opened(kind: str) -> Opened:
    """A tiny model without a tokenizer."""
    return Opened(kind, models.model(kind), None)


def passages(kind: str, count: int = 3, tokens: int = 60) -> list[Passage]:
    made = (prompt(kind, Row(tokens, 1, seed)) for seed in range(count))
    return [Passage(each, torch.ones_like(each["input_ids"], dtype=torch.bool)) for each in made]


@cache
def folder() -> Path:
    made = Path(tempfile.mkdtemp(prefix="kvmosaic-"))
    atexit.register(shutil.rmtree, made)
    return made


@cache
def file(kind: str, text: str) -> Path:
    """What method `text` learns for the tiny model of this kind."""
    path = folder() / f"{kind} {text}.safetensors".replace(" ", "-")
    learn(opened(kind), *settings(text), passages(kind), path)
    return path


def recipe(kind: str, text: str, more: str = "") -> str:
    """The method with its file, as it is written on the command line."""
    return f"{text} {more} calibration={file(kind, text)}"
