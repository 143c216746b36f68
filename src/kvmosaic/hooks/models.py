"""Which transformers models a compressed cache can serve, and why not the others."""

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from kvmosaic.errors import UnsupportedModel

CACHE_ARGUMENTS = ("cache", "past_key_values")
"""What models call the cache: from transformers 5.24 on, and before."""

REFUSED = {
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "longcat_flash", "minicpm3", "glm4_moe_lite"),
        "its cache holds latents that are expanded to keys after the cache returns them (MLA)",
    ),
    "diffllama": "it splits the values after the cache returns them",
    "jetmoe": "it repeats keys and values after the cache returns them",
    "mllama": "its visual tokens lie in cross-attention layers",
    **dict.fromkeys(
        ("falcon", "bloom", "gptj", "mpt", "codegen"), "its attention does not go through transformers' interface"
    ),
    **dict.fromkeys(("t5", "mt5", "umt5", "longt5", "udop"), "its attention adds a learned bias for each position"),
}
"""By `model_type` of the text model."""

SUPPORTED = "Llama, Qwen2, Qwen3, Mistral, Phi3, Gemma3, InternVL, LLaVA-OneVision, LLaVA-NeXT, Qwen2.5-VL, Qwen3-VL"


def cache_argument(model: nn.Module) -> str:
    """What this model's forward calls the cache."""
    return next(name for name in CACHE_ARGUMENTS if name in inspect.signature(model.forward).parameters)


def text_config(config: Any) -> Any:
    return config.get_text_config(decoder=True)


def layer_types(config: Any) -> list[tuple[str, dict[str, Any]]]:
    """(type, arguments of the stock cache layer) of each layer of the text model."""
    types, arguments = get_layer_types_and_kwargs(text_config(config))
    if isinstance(arguments, dict):  # transformers 5.17: one for all layers
        arguments = [arguments] * len(types)
    return list(zip(types, arguments, strict=True))


def check(config: Any) -> None:
    """Raises UnsupportedModel, with the reason, for a model whose cache cannot be compressed."""
    text = text_config(config)
    name = (getattr(config, "architectures", None) or [config.model_type])[0]
    for each in (config, text):
        if each.model_type in REFUSED:
            raise UnsupportedModel(
                f"{name}: {REFUSED[each.model_type]}, so stored bytes cannot be attended. Supported: {SUPPORTED}"
            )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{name}: encoder-decoder models keep two caches. Supported: {SUPPORTED}")
    if getattr(text, "num_kv_shared_layers", 0):
        raise UnsupportedModel(
            f"{name}: some layers read the keys of an earlier layer in the same step, exact ones. Supported: {SUPPORTED}"
        )
    types = {kind for kind, _ in layer_types(config)}
    if "full_attention" not in types:
        raise UnsupportedModel(
            f"{name}: no layer attends to the whole context ({', '.join(sorted(types))}), so there is nothing to "
            f"compress that grows. Supported: models with full-attention layers, as {SUPPORTED}"
        )


def context(config: Any) -> int | None:
    """Most tokens that the text model's positions are made for, its rotary scaling counted; None = not told."""
    text = text_config(config)
    most: int | None = getattr(text, "max_position_embeddings", None)
    if most is None:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    scaled = [most]
    for each in (rope, *rope.values()):  # one for all layers, or one for each type of layer
        if isinstance(each, dict) and each.get("factor"):
            scaled.append(int(each["factor"] * (each.get("original_max_position_embeddings") or most)))
    return max(scaled)


def frequencies(model: PreTrainedModel, kind: str) -> tuple[float, ...] | None:
    """Of the rotary embedding of the text model's layers of this kind, radians a place; None if none that turns halves is
    found."""
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    found = getattr(rotary, f"{kind}_inv_freq", getattr(rotary, "inv_freq", None))
    turn = getattr(sys.modules[type(rotary).__module__], "rotate_half", None)
    # some families turn neighbours (x0, x1) instead of halves (x0, xR); their function tells
    halves = turn is not None and turn(torch.arange(4.0)).tolist() == [-2.0, -3.0, 0.0, 1.0]
    return tuple(found.tolist()) if halves and isinstance(found, Tensor) else None


def visual_ids(config: Any) -> tuple[int, ...]:
    """The token ids that stand for visual tokens; empty for a text model.

    From the model's config, not the processor: Gemma3's processor calls its begin-of-image token the image token.
    """
    ids = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
    return tuple(dict.fromkeys(each for each in ids if each is not None))


def head_size(config: Any) -> int:
    """Channels of a KV head of the text model."""
    text = text_config(config)
    size: int = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return size


def fingerprint(config: Any) -> str:
    """What a cache or a calibration file must agree on with a model: family and shape of its text model."""
    text = text_config(config)
    heads = f"{text.num_attention_heads}/{getattr(text, 'num_key_value_heads', None) or text.num_attention_heads}"
    return f"{config.model_type} {text.num_hidden_layers} layers, {heads} heads of {head_size(config)}, hidden {text.hidden_size}, vocabulary {text.vocab_size}"


def language_model_key(model: PreTrainedModel) -> str | None:
    """The name of the text model's sub-config, so that a vision tower keeps its own attention; None for text models."""
    text = text_config(model.config)
    return next((key for key in model.config.sub_configs if getattr(model.config, key) is text), None)
