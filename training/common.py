"""What the training scripts share: turns as token ids, the optimizer and its schedule, checkpoints, the log."""

import argparse
import copy
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from kvmosaic import bundled
from kvmosaic.evals.example import Question

IGNORED = 0.0
CONTENT = 0.01  # random content cannot be predicted: with a full weight it takes the gradient from the answers
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Batch(NamedTuple):
    """ids: [B, T] int64. weights: [B, T] float32, of each token as a target.

    pixels: [tiles, 3, 64, 64], or nothing. named: [16 * tiles] int64, the token that each visual token has to name,
    -100 where there is none.
    """

    ids: Tensor
    weights: Tensor
    pixels: Tensor | None = None
    named: Tensor | None = None

    def to(self, device: str) -> "Batch":
        return Batch(*(None if column is None else column.to(device, non_blocking=True) for column in self))


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


def turns(
    tokenizer: PreTrainedTokenizerBase, questions: tuple[Question, ...], weight: float
) -> tuple[list[int], list[float]]:
    """The questions as turns that follow a context: ids, and the weight of each as a target. A turn ends with eos."""
    ids: list[int] = []
    weights: list[float] = []
    for question in questions:
        prompt, answer = (
            tokenizer(text, add_special_tokens=False).input_ids for text in (question.prompt, question.answer)
        )
        ids += [*prompt, *answer, tokenizer.eos_token_id]
        weights += [CONTENT] * len(prompt) + [weight] * (len(answer) + 1)
    return ids, weights


def weighted_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross entropy of the next token, by weight. logits: [B, T, vocabulary]."""
    targets, weights = batch.ids[:, 1:].flatten(), batch.weights[:, 1:].flatten()
    kept = weights > IGNORED
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1)[kept].float(), targets[kept], reduction="none")
    return (losses * weights[kept]).sum() / weights[kept].sum()


def train(
    description: str | None,
    name: str,
    auto: Any,
    draw: Callable[[PreTrainedTokenizerBase, int, int], Batch],
    loss: Callable[[Any, Batch], Tensor],
    batch_tokens: dict[str, int],
) -> None:
    """The command line of a training script: from a checkpoint on, for a number of seconds, to a new one with its log.

    name: of the bundled model to start from. auto: transformers' class that opens it. draw: (tokenizer, tokens, seed) to a
    batch. loss: of (model, batch). batch_tokens: by kind of device.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seconds", type=float, default=3000)
    parser.add_argument("--start", type=Path, default=bundled.path(name), help="checkpoint to go on from")
    parser.add_argument("--out", type=Path, required=True, help="folder for the new checkpoint")
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--batch-tokens", type=int, default=batch_tokens[DEVICE])
    parser.add_argument("--workers", type=int, default=0 if DEVICE == "cpu" else 12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the data; take another one when going on")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.start)
    model = auto.from_pretrained(arguments.start, dtype=torch.float32).to(DEVICE).train()
    log = fit(
        model,
        functools.partial(loss, model),
        functools.partial(draw, tokenizer, arguments.batch_tokens),
        seconds=arguments.seconds,
        rate=arguments.rate,
        seed=arguments.seed * 1_000_000,
        workers=arguments.workers,
        save=lambda: save_checkpoint(model, tokenizer, arguments.out),
    )
    (arguments.out / "log.json").write_text(json.dumps(log, indent=1) + "\n")


def fit(
    model: Any,
    loss_of: Callable[[Batch], Tensor],
    draw: Callable[[int], Batch],
    *,
    seconds: float,
    rate: float,
    seed: int,
    workers: int,
    save: Callable[[], None],
) -> list[dict[str, float]]:
    """Trains for `seconds` of wall clock, and returns the log.

    The rate rises over 30 steps, stays until half of the time is over, and falls linearly to a fiftieth.
    save: called every five minutes and at the end.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    rest = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)
    start, saved, tokens, log = time.monotonic(), time.monotonic(), 0, []
    recent: list[float] = []
    for step, batch in enumerate(DataLoader(Batches(draw, seed), batch_size=None, num_workers=workers)):
        elapsed = time.monotonic() - start
        if elapsed >= seconds:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 30, max(0.02, 2 * (1 - elapsed / seconds)))
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = loss_of(batch.to(DEVICE))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tokens += batch.ids.numel()
        recent.append(loss.item())
        if (step + 1) % 20 == 0:
            log.append(
                {"step": step + 1, "tokens": tokens, "seconds": round(elapsed), "loss": sum(recent) / len(recent)}
            )
            print("step {step} tokens {tokens} seconds {seconds} loss {loss:.4f}".format(**log[-1]), flush=True)
            recent = []
        if time.monotonic() - saved > 300:
            save()
            saved = time.monotonic()
    save()
    return log


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
