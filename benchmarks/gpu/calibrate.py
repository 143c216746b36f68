"""What calibration costs on a GPU: python benchmarks/gpu/calibrate.py

An 8B model (Llama-3.1-8B's geometry, random weights) over sequences of random tokens, as `kvmosaic calibrate` runs it: a pass forward
and back for each sequence, which is timed for all of them, then each layer's tables. Layers are alike, so some are timed and the
mean stands for the others.
"""

import argparse
import time
from typing import Any

import torch
from common import machine, parser, write
from decode import CONFIG, random_model

from kvmosaic import methods
from kvmosaic.evals import learn
from kvmosaic.loading import Opened

METHODS = ["kvquant bits=4", "cq coupled=8 bits=8"]


def seconds(since: float) -> float:
    torch.cuda.synchronize()
    return time.perf_counter() - since


def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    opened = Opened("random weights", random_model(), None)
    ids = torch.randint(CONFIG.vocab_size, (options.sequences, 1, options.length), device="cuda")
    passages = [learn.Passage({"input_ids": each}, torch.ones_like(each, dtype=torch.bool)) for each in ids]
    start = time.perf_counter()
    samples = learn.samples(opened, passages)
    passes, peak = seconds(start), torch.cuda.max_memory_allocated()
    print(
        f"{options.sequences} passes of {options.length} tokens: {passes:.1f} s, peak {peak / 2**30:.1f} GiB",
        flush=True,
    )
    rows = []
    for text in options.methods:
        name, settings = learn.settings(text)
        learner = methods.learner(name)
        assert learner is not None, "settings has asked"
        times = []
        for layer in range(options.layers):
            start = time.perf_counter()
            learner(samples[layer].to(opened.model.device), **settings)
            times.append(seconds(start))
        every = CONFIG.num_hidden_layers * sum(times) / len(times)
        rows.append({"method": text, "passes, seconds": passes, "layers, seconds": times, "peak of the passes": peak})
        rows[-1]["all, seconds"] = passes + every
        print(
            f"{text}: {sum(times) / len(times):.2f} s a layer ({options.layers} of {CONFIG.num_hidden_layers} timed), "
            f"{passes + every:.0f} s in all",
            flush=True,
        )
    return rows


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--methods", nargs="*", default=METHODS)
    arguments.add_argument("--sequences", type=int, default=16)
    arguments.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    arguments.add_argument("--layers", type=int, default=4, help="how many are timed")
    options = arguments.parse_args()
    torch.manual_seed(0)
    write("gpu_calibrate.json", machine(options.commit), measured(options), options.out)


if __name__ == "__main__":
    main()
