"""What the training scripts share: turns as token ids, the optimizer and its schedule, checkpoints, the log."""

import argparse
import copy
import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from kvmosaic import bundled
from kvmosaic.evals.example import Example

IGNORED = 0.0
TASKS = 16  # at most, "none" counted: the losses in the log are kept apart by task
CONTENT = 0.01  # random content cannot be predicted: with a full weight it takes the gradient from the answers
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Batch(NamedTuple):
    """ids: [B, T] int64. weights: [B, T] float32, of each token as a target. tasks: [B, T] int64, whose answer it is in.

    pixels: [tiles, 3, 64, 64] uint8, or nothing. named: [16 * tiles] int64, the token that each visual token has to name,
    -100 where there is none. Arrays as drawn (they pass from a worker by value: shared memory may be small), tensors
    once they are on a device.
    """

    ids: Any
    weights: Any
    tasks: Any
    pixels: Any = None
    named: Any = None

    def to(self, device: str) -> "Batch":
        columns = (None if column is None else torch.as_tensor(column).to(device) for column in self)
        return Batch(*columns)


class Batches(IterableDataset[Batch]):
    """An endless stream of batches; `draw` makes one from a seed, so that workers draw different ones."""

    def __init__(self, draw: Callable[[int], Batch], seed: int) -> None:
        self.draw, self.seed = draw, seed

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        seed, stride = (self.seed, 1) if worker is None else (self.seed + worker.id, worker.num_workers)
        while True:
            yield self.draw(seed)
            seed += stride


class Turns(NamedTuple):
    """Token ids, the weight of each as a target, and the task whose answer it belongs to (0: to none)."""

    ids: list[int]
    weights: list[float]
    tasks: list[int]

    def __add__(self, other: "Turns") -> "Turns":  # type: ignore[override]
        return Turns(*(ours + theirs for ours, theirs in zip(self, other, strict=True)))

    @classmethod
    def of(cls, ids: list[int], weight: float, task: int = 0) -> "Turns":
        return cls(ids, [weight] * len(ids), [task] * len(ids))

    def fit(self, length: int, padding: int) -> "Turns":
        """Cut, or padded on the right, to `length` tokens."""
        more = Turns.of([padding] * (length - len(self.ids)), IGNORED)
        return Turns(*(column[:length] for column in self + more))


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens: all in one call, which is twice as fast as one by one."""
    encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return [one.ids for one in encoded]


def asked(
    tokenizer: PreTrainedTokenizerBase, example: Example, context: str, weights: tuple[float, float], task: int
) -> Turns:
    """A context and its questions as turns that follow it; each ends with eos.

    weights: of what cannot be predicted (context and questions), and of the answers.
    """
    texts = [text for question in example.questions for text in (question.prompt, question.answer)]
    first, *encoded = encode(tokenizer, [context, *texts])
    made = Turns.of([tokenizer.bos_token_id, *first], weights[0])
    for prompt, answer in zip(encoded[::2], encoded[1::2], strict=True):
        made += Turns.of(prompt, weights[0]) + Turns.of([*answer, tokenizer.eos_token_id], weights[1], task)
    return made


def stacked(rows: list[Turns], **pictures: Any) -> Batch:
    """Rows of one length as a batch."""
    ids, weights, tasks = (np.array(column) for column in zip(*rows, strict=True))
    return Batch(ids, weights.astype(np.float32), tasks, **pictures)


class Loss(NamedTuple):
    """What is minimized, and for the log the sum of the cross entropies and the number of tokens of each task."""

    value: Tensor
    sums: Tensor
    counts: Tensor


def weighted_loss(logits: Tensor, batch: Batch) -> Loss:
    """Mean cross entropy of the next token, by weight. logits: [B, T, vocabulary]."""
    targets, weights, tasks = (column[:, 1:].flatten() for column in (batch.ids, batch.weights, batch.tasks))
    kept = (weights > IGNORED).nonzero().flatten()
    targets, weights, tasks = targets[kept], weights[kept], tasks[kept]
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1)[kept].float(), targets, reduction="none")
    empty = losses.new_zeros(TASKS)
    return Loss(
        (losses * weights).sum() / weights.sum(),
        empty.index_add(0, tasks, losses.detach()),
        empty.index_add(0, tasks, torch.ones_like(losses)),
    )


def train(
    description: str | None,
    name: str,
    auto: Any,
    draw: Callable[[PreTrainedTokenizerBase, int, int], Batch],
    loss: Callable[[Any, Batch], Loss],
    tasks: Sequence[str],
    batch_tokens: dict[str, int],
) -> None:
    """The command line of a training script: from a checkpoint on, for a number of seconds, to a new one with its log.

    name: of the bundled model to start from. auto: transformers' class that opens it. draw: (tokenizer, tokens, seed) to a
    batch. loss: of (model, batch). tasks: their names, in the order of their numbers, which start at 1. batch_tokens: by
    kind of device.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seconds", type=float, default=3000)
    parser.add_argument("--until", type=float, help="instead of --seconds: when to end, in seconds since the epoch")
    parser.add_argument("--start", type=Path, default=bundled.path(name), help="checkpoint to go on from")
    parser.add_argument("--out", type=Path, required=True, help="folder for the new checkpoint")
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--batch-tokens", type=int, default=batch_tokens[DEVICE])
    parser.add_argument("--workers", type=int, default=0 if DEVICE == "cpu" else 14)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the data; take another one when going on")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.start)
    model = auto.from_pretrained(arguments.start, dtype=torch.float32).to(DEVICE).train()
    log = fit(
        model,
        functools.partial(loss, model),
        functools.partial(draw, tokenizer, arguments.batch_tokens),
        tasks=tasks,
        end=arguments.until or time.time() + arguments.seconds,
        rate=arguments.rate,
        seed=arguments.seed * 1_000_000,
        workers=arguments.workers,
        save=lambda: save_checkpoint(model, tokenizer, arguments.out),
    )
    (arguments.out / "log.json").write_text(json.dumps(log, indent=1) + "\n")


def fit(
    model: Any,
    loss_of: Callable[[Batch], Loss],
    draw: Callable[[int], Batch],
    *,
    tasks: Sequence[str],
    end: float,
    rate: float,
    seed: int,
    workers: int,
    save: Callable[[], None],
) -> list[dict[str, Any]]:
    """Trains until `end` (seconds since the epoch), and returns the log.

    The rate rises over 100 steps, stays until half of the time is over, and falls linearly to a hundredth.
    save: called every 150 seconds and at the end.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    rest = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)
    start = saved = logged = time.time()
    tokens, log = 0, []
    recent = torch.zeros(2, TASKS, device=DEVICE)  # sums and counts since the last line of the log: read only there
    batches = DataLoader(
        Batches(draw, seed),
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_drawn,
        pin_memory=workers > 0 and DEVICE == "cuda",  # a thread of its own then reads what the workers send
        prefetch_factor=4 if workers else None,
    )
    for step, batch in enumerate(batches, start=1):
        now = time.time()
        if now >= end:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, step / 100, max(0.01, 2 * (end - now) / (end - start)))
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = loss_of(batch.to(DEVICE))
        optimizer.zero_grad(set_to_none=True)
        loss.value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tokens += math.prod(batch.ids.shape)
        recent += torch.stack([loss.sums, loss.counts])
        if now - logged > 10:
            means = (recent[0] / recent[1].clamp_min(1)).tolist()
            losses = {task: round(mean, 4) for task, mean in zip(("rest", *tasks), means, strict=False)}
            log.append({"step": step, "tokens": tokens, "seconds": round(now - start), "losses": losses})
            if len(log) % 3 == 1:
                print(f"step {step} {tokens / 1e6:.1f}M {tokens / (now - start):.0f}/s {losses}", flush=True)
            logged = now
            recent.zero_()
        if now - saved > 150:
            save()
            saved = now
    save()
    return log


def _as_drawn(batch: Batch) -> Batch:
    """Instead of the loader's own conversion to tensors."""
    return batch


def save_checkpoint(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a plain Hugging Face folder, weights in bfloat16; the model in memory stays as it is."""
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    for config in (model.config, model.config.get_text_config()):
        for name, value in tokens.items():
            setattr(config, name, value)
    model.generation_config = GenerationConfig(**tokens)
    # a copy of the module, not of its state: tied weights stay tied, and are written once
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write_dtype(folder / "config.json")


def _write_dtype(file: Path) -> None:
    """The config names the dtype of the weights, not of the model that was trained."""
    config = json.loads(file.read_text())
    for part in (config, config.get("text_config"), config.get("vision_config")):
        if part is not None:
            part["dtype"] = "bfloat16"
    file.write_text(json.dumps(config, indent=2) + "\n")
