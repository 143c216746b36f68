"""Tiny random models of every supported family, and prompts for them. Weights are scaled so that errors show.

Head size 32; two full-attention layers, after a sliding one where the family has them. Built once a session and kind.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import transformers as hf
from torch import Tensor

VOCAB, IMAGE, VIDEO, START, END, PAD = 200, 190, 193, 191, 192, 0
_TEXT = dict(
    vocab_size=VOCAB,
    hidden_size=128,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=PAD,
    tie_word_embeddings=False,
)
_VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
_SLIDING = dict(num_hidden_layers=3, layer_types=["sliding_attention", "full_attention", "full_attention"])
_QWEN = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)


class Row(NamedTuple):
    """One sequence of a batch: how many text tokens, how many pictures (or how wide a one), and of which randomness."""

    text: int = 45
    pictures: int = 1
    seed: int = 0


def _config(kind: str) -> Any:
    match kind:
        case "llama":
            return hf.LlamaConfig(**_TEXT)
        case "qwen2":
            return hf.Qwen2Config(**_TEXT)
        case "qwen3":
            return hf.Qwen3Config(**_TEXT, head_dim=32)
        case "mistral":
            return hf.MistralConfig(**_TEXT, sliding_window=None)
        case "phi3":
            return hf.Phi3Config(**_TEXT)
        case "gemma3_text":
            return hf.Gemma3TextConfig(
                **_TEXT | _SLIDING,
                head_dim=32,
                sliding_window=16,
                query_pre_attn_scalar=48,
                final_logit_softcapping=None,
            )
        case "gemma2":  # a cap that bites: the tiny model's logits pass it
            return hf.Gemma2Config(
                **_TEXT | _SLIDING, head_dim=32, sliding_window=16, query_pre_attn_scalar=8, attn_logit_softcapping=2.0
            )
        case "gpt_oss":
            return hf.GptOssConfig(
                **_TEXT | _SLIDING, head_dim=32, sliding_window=16, num_local_experts=2, num_experts_per_tok=1
            )
        case "internvl":
            return hf.InternVLConfig(
                text_config=dict(model_type="qwen2", **_TEXT),
                vision_config=_VISION | dict(image_size=(64, 64), patch_size=(8, 8)),
                image_token_id=IMAGE,
                image_seq_length=16,
            )
        case "llava_onevision":
            return hf.LlavaOnevisionConfig(
                text_config=dict(model_type="qwen2", **_TEXT),
                vision_config=dict(
                    model_type="siglip_vision_model", vision_use_head=False, image_size=32, patch_size=8, **_VISION
                ),
                image_token_index=IMAGE,
                video_token_index=VIDEO,
                image_grid_pinpoints=[[32, 32], [32, 64]],
            )
        case "llava_next":
            return hf.LlavaNextConfig(
                text_config=dict(model_type="llama", **_TEXT),
                vision_config=dict(
                    model_type="clip_vision_model", image_size=32, patch_size=8, projection_dim=32, **_VISION
                ),
                image_token_index=IMAGE,
                image_grid_pinpoints=[[32, 32], [32, 64]],
                vision_feature_layer=-1,
            )
        case "qwen2_5_vl":
            rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6])
            vision = dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=8, out_hidden_size=128)
            vision |= dict(window_size=32, fullatt_block_indexes=[1])
            return hf.Qwen2_5_VLConfig(text_config=_TEXT | dict(rope_parameters=rope), vision_config=vision, **_QWEN)
        case "qwen3_vl":
            rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[8, 4, 4], mrope_interleaved=True)
            vision = dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=8, out_hidden_size=128)
            vision |= dict(num_position_embeddings=64, deepstack_visual_indexes=[0, 1])
            text = _TEXT | dict(rope_parameters=rope, head_dim=32)
            return hf.Qwen3VLConfig(text_config=text, vision_config=vision, **_QWEN)
    raise ValueError(kind)


_CLASSES = {
    "llama": hf.LlamaForCausalLM,
    "qwen2": hf.Qwen2ForCausalLM,
    "qwen3": hf.Qwen3ForCausalLM,
    "mistral": hf.MistralForCausalLM,
    "phi3": hf.Phi3ForCausalLM,
    "gemma3_text": hf.Gemma3ForCausalLM,
    "gemma2": hf.Gemma2ForCausalLM,
    "gpt_oss": hf.GptOssForCausalLM,
    "internvl": hf.InternVLForConditionalGeneration,
    "llava_onevision": hf.LlavaOnevisionForConditionalGeneration,
    "llava_next": hf.LlavaNextForConditionalGeneration,
    "qwen2_5_vl": hf.Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": hf.Qwen3VLForConditionalGeneration,
}
KINDS = list(_CLASSES)
VISUAL = ["internvl", "llava_onevision", "llava_next", "qwen2_5_vl", "qwen3_vl"]
STOCK_EAGER = ("gemma2", "gpt_oss")
"""Their caps and sinks are right in transformers' eager attention only."""


def make(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A new model; `changes` are set on its text config."""
    config = _config(kind)
    for name, value in changes.items():
        setattr(config.get_text_config(decoder=True), name, value)
    torch.manual_seed(seed)
    eager = {"attn_implementation": "eager"} if kind in STOCK_EAGER else {}
    model = _CLASSES[kind]._from_config(config, **eager).eval().requires_grad_(False)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, PAD
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        # freshly initialised, attention would be nearly uniform
        if weight.dim() > 1 and any(part in name for part in ("_proj", "lm_head", "embed_tokens", "experts", "router")):
            fan_in = weight.shape[-2] if "experts" in name else weight.shape[-1]
            weight.copy_(torch.randn(weight.shape, generator=generator) * fan_in**-0.5)
            if "lm_head" in name:
                weight[180:] = 0  # an answer holds no placeholder of a picture
        elif name.endswith("sinks"):
            weight.copy_(torch.randn(weight.shape, generator=generator) + 2)
    return model


@cache
def model(kind: str) -> Any:
    """The session's model of this kind, for compressed caches."""
    return make(kind)


@cache
def stock(kind: str) -> Any:
    """The same weights, never touched by kvmosaic: for what must come out."""
    return make(kind)


def visual_tokens(kind: str, pictures: int) -> int:
    """How many placeholder ids a row with that many pictures has."""
    if kind not in VISUAL or not pictures:
        return 0
    if kind.startswith("llava"):  # base tile, then 4 x 4 a tile with a newline a line
        return 16 + 4 * (4 * pictures + 1)
    return {"internvl": 16, "qwen2_5_vl": 8, "qwen3_vl": 8}[kind] * pictures


def prompt(kind: str, *rows: Row) -> dict[str, Any]:
    """What generate takes, for these rows; shorter ones padded on the left. The mask comes with padding only."""
    rows = rows or (Row(),)
    lines, pixels, grids = [], [], []
    for row in rows:
        generator = torch.Generator().manual_seed(row.seed)
        ids = torch.randint(2, 180, (row.text,), generator=generator).tolist()
        if tokens := visual_tokens(kind, row.pictures):
            if kind == "internvl":  # pictures apart, text between them
                for at in range(row.pictures):
                    ids[5 + at : 5 + at] = [START] * (at > 0) + [IMAGE] * 16
                    at += 16
                ids = _apart(ids, row)
                pixels.append(torch.randn(row.pictures, 3, 64, 64, generator=generator))
            else:
                ids[5:5] = [START, *[IMAGE] * tokens, END]
                if kind.startswith("llava"):
                    tiles = torch.randn(1, 1 + row.pictures, 3, 32, 32, generator=generator)
                    pixels.append(torch.nn.functional.pad(tiles, (0, 0) * 3 + (0, 2 - row.pictures)))
                    grids.append([32, 32 * row.pictures])
                else:
                    pixels.append(torch.randn(32 * row.pictures, 3 * 2 * 8 * 8, generator=generator))
                    grids.append([1, 4, 8 * row.pictures])
        lines.append(ids)
    longest = max(len(line) for line in lines)
    ids = torch.tensor([[PAD] * (longest - len(line)) + line for line in lines])
    found: dict[str, Any] = {"input_ids": ids}
    if len({len(line) for line in lines}) > 1:
        found["attention_mask"] = torch.tensor(
            [[0] * (longest - len(line)) + [1] * len(line) for line in lines], dtype=torch.int64
        )
    if pixels:
        found["pixel_values"] = torch.cat(pixels)
        if kind.startswith("llava"):
            found["image_sizes"] = torch.tensor(grids)
        elif kind.startswith("qwen"):
            found["image_grid_thw"] = torch.tensor(grids)
            found["mm_token_type_ids"] = (ids == IMAGE).int()
    return found


def _apart(ids: list[int], row: Row) -> list[int]:
    """Text and pictures in turn: 5 text tokens, a picture, 2 text tokens, a picture, ..., the rest of the text."""
    text = [each for each in ids if each not in (IMAGE, START)]
    found = text[:5]
    for at in range(row.pictures):
        found += [IMAGE] * 16 + text[5 + 2 * at : 7 + 2 * at]
    return found + text[5 + 2 * row.pictures :]


def generate(model: Any, inputs: dict[str, Any], cache: Any = None, tokens: int = 20, **options: Any) -> Tensor:
    """The new tokens, greedily unless the options say otherwise. A seed is set for sampling."""
    torch.manual_seed(0)
    options = {"do_sample": False} | options
    # Qwen-VL keeps the offset of its positions on the model: an older prompt's must not leak in
    if hasattr(getattr(model, "model", None), "rope_deltas"):
        model.model.rope_deltas = None
    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=tokens, **options)
    out = getattr(out, "sequences", out)
    return out[:, inputs["input_ids"].shape[1] :]


def logits(model: Any, inputs: dict[str, Any], cache: Any = None, tokens: int = 20, **options: Any) -> Tensor:
    """[tokens, B, vocabulary]: of greedy generation."""
    if hasattr(getattr(model, "model", None), "rope_deltas"):
        model.model.rope_deltas = None
    out = model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return torch.stack(out.logits)
