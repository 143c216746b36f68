"""Attaching a recipe to a model, so that generate needs no cache argument; and the hook that every cache relies on."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvmosaic.errors import CacheMismatch, UnsupportedModel
from kvmosaic.hooks import models
from kvmosaic.hooks.attention import NAME
from kvmosaic.hooks.cache import Cache
from kvmosaic.hooks.models import CACHE_ARGUMENTS
from kvmosaic.hooks.rotary import watch_positions
from kvmosaic.recipe import Recipe

_HOOKED = "_kvmosaic_hooks"
_PREVIOUS = "_kvmosaic_previous_attention"


def prepare(model: PreTrainedModel) -> None:
    """Set the text model's attention to kvmosaic's, and tell its caches of each forward pass. Does nothing twice.

    Raises UnsupportedModel if the model does not take an attention function.
    """
    text = models.text_config(model.config)
    if text._attn_implementation != NAME:
        setattr(model, _PREVIOUS, text._attn_implementation)
        _set_attention(model, NAME)
        if text._attn_implementation != NAME:
            raise UnsupportedModel(
                f"{type(model).__name__} does not take its attention function from transformers' interface. "
                f"Supported: {models.SUPPORTED}"
            )
    if not hasattr(model, _HOOKED):
        passing, hooks = _Pass(model.config), []
        for module in _entries(model):
            hooks.append(module.register_forward_pre_hook(passing.begin, with_kwargs=True))
            hooks.append(module.register_forward_hook(passing.end, with_kwargs=True, always_call=True))
        if (watched := watch_positions(model, passing.place)) is not None:
            hooks.append(watched)
        setattr(model, _HOOKED, hooks)


def attach(model: PreTrainedModel, recipe: Recipe) -> None:
    """From now on `model.generate(...)` makes a cache of this recipe when none is passed. `detach` undoes it.

    The cache is in the output: `generate(..., return_dict_in_generate=True).past_key_values.report()`.
    Raises UnsupportedModel as `Cache` does, and ValueError if another recipe is attached.
    """
    if "_prepare_cache_for_generation" in vars(model):
        raise ValueError("a recipe is attached to this model already. Call kvmosaic.detach(model) first")
    Cache(model, recipe)  # refuses now, not at the first generate
    stock = model._prepare_cache_for_generation
    name = models.cache_argument(model)

    def prepare_cache(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if cache_in(model_kwargs) is None and generation_config.use_cache is not False:
            if generation_config.cache_implementation is not None:
                raise ValueError(
                    f"cache_implementation={generation_config.cache_implementation!r} and an attached recipe exclude each "
                    "other. Drop the argument, or call kvmosaic.detach(model)"
                )
            model_kwargs[name] = cache = Cache(model, recipe)
            if generation_config.is_assistant:
                cache.activate_past_recording()
            return None
        return stock(generation_config, model_kwargs, *args, **kwargs)

    model._prepare_cache_for_generation = prepare_cache


def detach(model: PreTrainedModel) -> None:
    """Undo `attach` and `Cache`: the model's own attention and caches. A cache made before no longer works with it."""
    vars(model).pop("_prepare_cache_for_generation", None)
    for hook in vars(model).pop(_HOOKED, ()):
        hook.remove()
    previous = vars(model).pop(_PREVIOUS, None)
    if previous is not None:
        _set_attention(model, previous)


@contextmanager
def compress(model: PreTrainedModel, recipe: Recipe) -> Iterator[None]:
    """`with kvmosaic.compress(model, recipe): model.generate(...)`: `attach` at the start, `detach` at the end."""
    attach(model, recipe)
    try:
        yield
    finally:
        detach(model)


@contextmanager
def unhooked(model: PreTrainedModel) -> Iterator[None]:
    """Without the calls before and after each forward pass, for steps that need none (and are compiled)."""
    for hook in vars(model).pop(_HOOKED, ()):
        hook.remove()
    try:
        yield
    finally:
        prepare(model)


def cache_in(arguments: dict[str, Any]) -> Any:
    return next((arguments[name] for name in CACHE_ARGUMENTS if arguments.get(name) is not None), None)


def _set_attention(model: PreTrainedModel, name: str) -> None:
    key = models.language_model_key(model)
    model.set_attn_implementation({key: name} if key else name)


def _entries(model: PreTrainedModel) -> Iterator[nn.Module]:
    """The modules at which token ids enter: the model itself, and what it wraps if that can be called with ids."""
    yield model
    inner = getattr(model, "model", None)
    if isinstance(inner, nn.Module) and "input_ids" in inspect.signature(inner.forward).parameters:
        yield inner


class _Pass:
    """What a forward pass tells its cache: that it begins and ends; which tokens are visual, which the text model, with its
    embeddings, does not see; and the positions, which only the text model sees."""

    def __init__(self, config: Any) -> None:
        self.fingerprint = models.fingerprint(config)
        self.visual_ids = models.visual_ids(config)
        self.running: dict[int, Cache] = {}  # by thread

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = cache_in(kwargs)
        ids, embeds = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
        entering = embeds if ids is None else ids
        if not isinstance(cache, Cache) or entering is None:
            return
        if kwargs.get("output_attentions") and not cache.recipe.is_exact:
            raise ValueError(
                "output_attentions: over a compressed cache no weights of single tokens exist. Leave it out, or use the exact "
                'cache with attn_implementation="eager"'
            )
        mask, seen = kwargs.get("attention_mask"), cache.get_seq_length()
        if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] < seen + entering.shape[1]:
            raise CacheMismatch(
                f"attention_mask has {mask.shape[1]} columns, and there are {seen} tokens in the cache and {entering.shape[1]} new "
                "ones. It must cover both: the later columns would be taken for padding"
            )
        visual = None
        if cache.recipe.sees_visual:
            if ids is None:
                raise ValueError(
                    "a recipe with visual tokens needs input_ids: from inputs_embeds alone nobody can tell which tokens are "
                    "visual"
                )
            shown = torch.isin(ids, torch.tensor(self.visual_ids, device=ids.device))
            visual = shown if bool(shown.any()) else None
        cache.begin(self.fingerprint, entering.shape[0], entering.shape[1], ids, visual)
        self.running[threading.get_ident()] = cache

    def place(self, position: Tensor) -> None:
        cache = self.running.get(threading.get_ident())
        if cache is not None:
            cache.place(position)

    def end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = cache_in(kwargs)
        if isinstance(cache, Cache):
            self.running.pop(threading.get_ident(), None)
            cache.end(failed=output is None)
