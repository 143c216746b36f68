"""What selections cost and save on a GPU: python benchmarks/gpu/selection.py --parts h2o

h2o: decode steps with 20 % of 32k tokens, each of which takes another's slot, against our own captured exact steps; caches of
    random numbers, no prompt is read (Llama-3.1-8B's geometry, random weights).
zipcache: prompts and steps of 8 x 4k tokens in the same model, and the memory beyond its weights, against mixed precision as
    MiKV has it: all queries score, by our kernel or by the matrix of probabilities of one sequence at a time, and a step turns
    codes back into numbers and attends those.
zipvl: whole prompts with 40 % of important tokens (LLaMA-2-7B's geometry, 8 of its layers), and their attention alone.
scores: the passes that score a prompt's tokens against the attention of the same layer.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from common import graphed, machine, microseconds, parser, random_store, write
from decode import CONFIG, cache_bytes, captured, prompt_time, random_model, recipe, step_time
from torch import Tensor
from transformers import LlamaConfig

import kvmosaic
from kvmosaic import Recipe, methods
from kvmosaic.hooks.layer import CacheLayer
from kvmosaic.hooks.pinned import Pinned
from kvmosaic.kernels import layout, step
from kvmosaic.kernels.encode import cuda as encode
from kvmosaic.kernels.scores import column_sums, reference
from kvmosaic.prefill import AmongImportant
from kvmosaic.selection import Saliency, Step, saliency
from kvmosaic.stores import EXACT, EvictingStore, LaneBytes

CONTEXT, KEPT, BATCH, BUDGET, ROOM = 32768, "h2o keep=0.2", 8, 30, 400
"""Tokens; the recipe; sequences at equal batch; GB of cache; steps that there is room for."""


def fill(layer: CacheLayer, text: str, batch: int, context: int) -> None:
    """As if `context` tokens had come: random numbers, and of `KEPT` a fifth of them with columns, all slots taken."""
    heads, size = CONFIG.num_key_value_heads, CONFIG.head_dim
    empty = torch.empty(batch, heads, 0, size, dtype=torch.bfloat16, device="cuda")
    layer.lazy_initialization(empty, empty)
    layer.seen = context
    if text == "exact":
        layer.stores["tier 0"] = random_store(EXACT, batch, heads, context, size, ROOM)
        return
    kept = context // 5
    store = EvictingStore(random_store(EXACT, batch, heads, kept, size))
    store.position = torch.arange(0, 5 * kept, 5, device="cuda").to(torch.int32).expand(batch, heads, kept).contiguous()
    store.score = torch.rand(batch, heads, kept, device="cuda")
    store.capacity = torch.full((batch,), kept, device="cuda")
    store.placed.fill_(context)
    layer.stores["tier 0"] = store


def one_layer(text: str, batch: int, context: int) -> float:
    """Microseconds of a step's attention and what belongs to it (scores, the slot, the token's bytes) in one layer."""
    layer = CacheLayer(0, 1, recipe(text))
    fill(layer, text, batch, context)
    layer.pinned = Pinned(layer, ROOM, torch.ones(1, dtype=torch.int32, device="cuda"))
    query = torch.randn(batch, CONFIG.num_attention_heads, 1, CONFIG.head_dim, device="cuda").bfloat16()
    keys, values = torch.randn(2, batch, CONFIG.num_key_value_heads, 1, CONFIG.head_dim, device="cuda").bfloat16()
    step = layer.pinned
    return microseconds(graphed(lambda: step.attend(query, keys, values, CONFIG.head_dim**-0.5, None, None)))


def whole_step(model: Any, text: str, batch: int, context: int, compiled: bool) -> tuple[float, int]:
    """Microseconds of a replayed step, and bytes of the cache."""
    cache = kvmosaic.Cache(model, recipe(text))
    for layer in cache.layers:
        fill(layer, text, batch, context)
    held = cache_bytes(cache)
    each = step_time(model, cache, batch, ROOM, compiled)
    del cache
    gc.collect()
    torch.cuda.empty_cache()
    return each, held


def h2o(compiled: bool, context: int = CONTEXT, batch: int = BATCH) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def add(what: str, text: str, batch: int, each: float, better: float, **more: Any) -> None:
        rows.append(
            {"what": what, "cache": text, "batch": batch, "microseconds": each, "against exact": better, **more}
        )
        print(f"{what:32} {text:14} batch {batch:3}  {each:9.1f} us  {better:5.2f}x", flush=True)

    layers = {text: one_layer(text, batch, context) for text in ("exact", KEPT)}
    for text, each in layers.items():
        add(f"attention, {context} tokens", text, batch, each, layers["exact"] / each)
    torch.cuda.empty_cache()
    model = random_model()
    steps = {text: whole_step(model, text, batch, context, compiled) for text in ("exact", KEPT)}
    for text, (each, held) in steps.items():
        add(f"step, {context} tokens", text, batch, each, steps["exact"][0] / each, bytes=held)
    rates: dict[str, float] = {}
    for text, (_, held) in steps.items():
        most = int(BUDGET * 1e9 // (held / batch))
        each, held = whole_step(model, text, most, context, compiled)
        rates[text] = most / each * 1e6
        better = rates[text] / rates["exact"]
        add(f"step, {BUDGET} GB", text, most, each, better, bytes=held, **{"tokens a second": rates[text]})
    return rows


def matrix_sums(query: Tensor, keys: Tensor, scale: float, valid: Tensor, asking: Tensor | None = None) -> Tensor:
    """Column sums as standard attention has them: the probabilities of a whole sequence, held at once."""
    batch, heads, tokens, _ = keys.shape
    past = torch.ones(tokens, tokens, dtype=torch.bool, device=keys.device).tril()
    sums = []
    for row in range(batch):
        grouped = query[row].unflatten(0, (heads, -1))
        logits = (grouped @ keys[row, :, None].mT * scale).masked_fill(~past, -torch.inf)
        sums.append(logits.softmax(-1, dtype=torch.float32).to(query.dtype).sum(2, dtype=torch.float32).mean(1))
    return torch.stack(sums)


def numbers(lane: LaneBytes, tokens: int) -> Tensor:
    """The first tokens of a lane whose tokens came in one run, turned back into numbers."""
    packed = lane.read(0, tokens)
    parts = {name: x[:, :, :1] if lane.parts[name].every is None else x[:, :, :tokens] for name, x in packed.items()}
    return lane.lane.codec.decode(parts).to(lane.ring.dtype)


@torch.library.custom_op("benchmark::dequantized", mutates_args=())
def dequantized(
    query: Tensor, keys: Tensor, values: Tensor, number: int, scale: float, softcap: float | None
) -> Tensor:
    """A step (`kernels/step.py`) that turns all codes back into numbers first."""
    stores, lengths = step._steps[number].stores, LENGTHS[number]
    sides = [[keys], [values]]
    for store, length in zip(stores, lengths, strict=True):
        sides[0].append(numbers(store.keys, length))
        sides[1].append(numbers(store.values, length))
    dense = [torch.cat(side, 2) for side in sides]
    out = F.scaled_dot_product_attention(query, *dense, scale=scale, enable_gqa=True).transpose(1, 2).contiguous()
    first, at = stores[0], step._steps[number]
    encode.append(first.keys, first.values, first.length, at.arrived, at.live, (keys, values))
    return out


@dequantized.register_fake
def _(query: Tensor, keys: Tensor, values: Tensor, number: int, scale: float, softcap: float | None) -> Tensor:
    return query.new_empty(query.shape[0], 1, *query.shape[1::2])


LENGTHS: dict[int, list[int]] = {}
"""Tokens of each store of a step; here all rows hold as many."""


@contextmanager
def by_numbers() -> Iterator[None]:
    """The steps of caches that are pinned meanwhile turn codes back into numbers."""
    order, run, register = layout._order, step._run, step.register

    def registered(stores: Any, live: Tensor, scored: Any = None) -> Any:
        made = register(stores, live, scored)
        LENGTHS[made.number] = [int(store.length.max()) for store in stores]
        return made

    layout._order = cache(lambda *form: order(*form).cuda())  # type: ignore[assignment]  # a graph copies none from the host
    step._run, step.register = dequantized, registered  # type: ignore[assignment]
    try:
        yield
    finally:
        layout._order, step._run, step.register = order, run, register  # type: ignore[assignment]


def prompt(model: Any, chosen: Recipe, ids: Tensor, times: int = 3) -> tuple[float, Any]:
    """Microseconds of a prompt, and its cache."""
    found = []
    for _ in range(times):
        held = kvmosaic.Cache(model, chosen)
        found.append(prompt_time(model, held, ids))
    return statistics.median(found[1:]), held  # the first one compiles


def gathering(held: kvmosaic.Cache) -> float:
    """Microseconds in which the tokens that wait, as many as there may be, get their tiers in all layers."""
    for layer in held.layers:
        store = layer.pinned.waiting.store.store
        for counted in (store.length, store.keys.coded, store.values.coded):
            counted.fill_(100)
    torch.cuda.synchronize()
    start = time.perf_counter()
    held.gather()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e6


def zipcache(compiled: bool, batch: int = 8, context: int = 4096) -> list[dict[str, Any]]:
    chosen, model = methods.get("zipcache")(), random_model()
    every = Recipe(selection=Saliency(share=0.6, probes=(1.0, 0.0)), tiers=chosen.tiers, name="all queries score")
    ids = torch.randint(CONFIG.vocab_size, (batch, context), device="cuda")
    weights = torch.cuda.memory_allocated()
    rows: list[dict[str, Any]] = []
    cases: dict[str, tuple[Recipe, Callable[..., Tensor], bool]] = {
        "zipcache": (chosen, column_sums, False),
        "all queries by our kernel, numbers": (every, column_sums, True),
        "all queries by their matrix, numbers": (every, matrix_sums, True),
    }
    for name, (each, sums, dense) in cases.items():
        torch.cuda.reset_peak_memory_stats()
        saliency.column_sums = sums
        took, held = prompt(model, each, ids)
        saliency.column_sums = column_sums
        row = {"what": f"{batch} x {context}", "cache": name, "prompt": took, "bytes": cache_bytes(held)}
        row["peak of the prompt"] = torch.cuda.max_memory_allocated() - weights
        torch.cuda.reset_peak_memory_stats()
        with by_numbers() if dense else nullcontext():
            steps = captured(model, held, batch, 199, compiled)  # fewer are made than are chosen among at a time
        assert steps.graph is not None, "captured"
        row["step"] = microseconds(steps.graph.replay, 0.5, 60)
        row["peak of the steps"] = torch.cuda.max_memory_allocated() - weights
        row["tiers of 100 tokens"] = gathering(held)
        rows.append(row)
        print(
            f"{name:38} prompt {row['prompt']:10.0f} us  step {row['step']:8.0f} us  peaks "
            f"{row['peak of the prompt'] / 2**30:6.2f} and {row['peak of the steps'] / 2**30:6.2f} GiB; every 100 steps "
            f"{row['tiers of 100 tokens']:8.0f} us",
            flush=True,
        )
        held.unpin()
        del steps, held
        gc.collect()
        torch.cuda.empty_cache()
    return rows


SEVEN_B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=8, num_attention_heads=32, num_key_value_heads=32,
    head_dim=128, vocab_size=32000, max_position_embeddings=131072, eos_token_id=None, pad_token_id=0,
)  # fmt: skip


def attention_among(context: int) -> tuple[float, float]:
    """Microseconds of one layer's attention, and of that among 40 % of the tokens."""
    heads, size = SEVEN_B.num_attention_heads, SEVEN_B.head_dim
    query, keys, values = torch.randn(3, 1, context, heads, size, device="cuda").bfloat16().transpose(2, 3)
    place = torch.arange(context, device="cuda")[None]
    at = Step(0, 1, query, keys, values, size**-0.5, place, torch.zeros_like(place, dtype=torch.bool), None)
    tier = torch.ones(1, heads, context, dtype=torch.int8, device="cuda")
    tier[:, :, torch.randperm(context, device="cuda")[: context * 2 // 5]] = 0
    whole = microseconds(lambda: F.scaled_dot_product_attention(query, keys, values, is_causal=True), 0.3, 20)
    return whole, microseconds(lambda: AmongImportant().attend(at, tier), 0.3, 20)


def zipvl(compiled: bool, contexts: tuple[int, ...] = (16384, 32768, 65536)) -> list[dict[str, Any]]:
    sparse = Recipe(
        selection=Saliency(share=0.4, by_head=False, probes=(64, 64)),
        tiers=methods.get("zipvl")().tiers,
        prefill=AmongImportant(),
        name="zipvl, 40 %",
    )
    exact = Recipe(tiers=(EXACT,), name="exact")
    model = random_model(SEVEN_B)
    rows: list[dict[str, Any]] = []
    for context in contexts:
        ids = torch.randint(SEVEN_B.vocab_size, (1, context), device="cuda")
        took = {chosen.name: prompt(model, chosen, ids)[0] for chosen in (exact, sparse)}
        whole, among = attention_among(context)
        row = {"what": f"prompt of {context}, 8 layers", "exact": took["exact"], "sparse": took[sparse.name]}
        row |= {"faster": took["exact"] / took[sparse.name], "attention": whole, "among important": among}
        row["of the ideal"] = among / (whole * 0.4**2)
        rows.append(row)
        print(
            f"{context:6} tokens: {took['exact']:10.0f} to {took[sparse.name]:10.0f} us, {row['faster']:5.2f}x; attention "
            f"{whole:8.0f} to {among:8.0f} us, {row['of the ideal']:5.2f} of the ideal",
            flush=True,
        )
        torch.cuda.empty_cache()
    return rows


def scores(compiled: bool, contexts: tuple[int, ...] = (8192, 32768)) -> list[dict[str, Any]]:
    heads, kv_heads, size = CONFIG.num_attention_heads, CONFIG.num_key_value_heads, CONFIG.head_dim
    rows: list[dict[str, Any]] = []
    for context in contexts:
        query = torch.randn(1, context, heads, size, device="cuda").bfloat16().transpose(1, 2)
        keys, values = torch.randn(2, 1, context, kv_heads, size, device="cuda").bfloat16().transpose(2, 3)
        valid = torch.ones(1, context, dtype=torch.bool, device="cuda")
        attention = microseconds(
            lambda: F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)  # noqa: B023
        )
        newest = torch.arange(context, device="cuda")[None] >= context - 32
        passes: dict[str, tuple[Callable[..., Tensor], Tensor | None]] = {
            "all queries": (column_sums, None),
            "a tenth of them (zipcache)": (column_sums, Saliency(share=0.6)._probes(valid)),
            "128 of them (zipvl)": (column_sums, Saliency(share=0.6, probes=(64, 64))._probes(valid)),
            "the newest 32 (snapkv)": (column_sums, newest),
            "all queries, PyTorch": (reference.column_sums, None),
        }
        if context > 8192:
            del passes["all queries, PyTorch"]  # seconds
        for name, (sums, asking) in passes.items():
            took = microseconds(lambda: sums(query, keys, size**-0.5, valid, asking), 0.1, 20)  # noqa: B023
            rows.append({"what": f"{context} tokens, {name}", "microseconds": took, "of attention": took / attention})
            print(
                f"{rows[-1]['what']:44} {took:9.0f} us  {100 * took / attention:7.1f} % of {attention:8.0f} us",
                flush=True,
            )
    return rows


PARTS = {"h2o": h2o, "zipcache": zipcache, "zipvl": zipvl, "scores": scores}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    options.add_argument("--eager", action="store_true", help="the model's own part of a step as it is, not compiled")
    arguments = options.parse_args()
    torch.manual_seed(0)
    setting = machine(arguments.commit) | {"compiled": not arguments.eager}
    print(setting, flush=True)
    for part in arguments.parts:
        write(f"gpu_selection_{part}.json", setting, PARTS[part](not arguments.eager), arguments.out)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
