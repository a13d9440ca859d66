"""Between a transformers attention module and its q, k, v: one name in its AttentionInterface and one in its mask's.

The name is chosen per config, not per layer, so every attention of a patched model comes here; what a layer does hangs
on its module. One that is not patched, or whose call a method refuses, runs what the model ran before.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from attn_plugins.method import AttentionCall
from attn_plugins.patches.causal_mask import as_matrix, is_ours, make_mask, read_mask
from attn_plugins.patches.family import Family, SequenceReader, Site, Undo
from attn_plugins.runtime import UNKNOWN, Layer, RootState

NAME = "attn_plugins"
STATE = "_attn_plugins"
BEFORE = "_attn_plugins_before"  # on every attention module of a patched model: the implementation it had
# keyword arguments that change what attention is; a method that knows none of them must not be asked
MEANINGFUL = ("softcap", "s_aux", "position_bias", "cache")


def attention_forward(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
    dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """The function for transformers' AttentionInterface: (B, H, N, D) in, ((B, N, H, D), weights or None) out."""
    layer: Layer | None = module.__dict__.get(STATE)
    if layer is not None:
        reason = _why_dense(module, query, key, attention_mask, kwargs)
        if reason is not None:
            layer.root.refuse(reason)
        else:
            causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
            out = layer.attend(
                AttentionCall(
                    query, key, value, layer.kind, None, scaling, None, causal, dropout,
                    keys=read_mask(attention_mask), sliding_window=kwargs.get("sliding_window"),
                )
            )  # fmt: skip
            if out is not None:
                return out.transpose(1, 2), None
    return _dense(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)


def _why_dense(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: Any, kwargs: Mapping[str, Any]
) -> str | None:
    for name in MEANINGFUL:
        if kwargs.get(name) is not None:
            return f"the model passes {name} to its attention"
    config = getattr(module, "config", None)
    if kwargs.get("output_attentions") or getattr(config, "output_attentions", False):
        return "output_attentions asks for the dense weights"
    if not is_ours(mask):
        return "the model passes an attention mask of its own making (4-D, packed sequences or blocks)"
    if mask is not None and mask.shape[-1] != key.shape[2] + 2:
        return f"the cache of this layer holds {key.shape[2]} keys, and the mask is for {mask.shape[-1] - 2}"
    if query.shape[2] > key.shape[2]:
        return f"{query.shape[2]} queries beside {key.shape[2]} keys: not causal self-attention"
    return None


def _dense(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any,
    dropout: float, scaling: float | None, is_causal: bool | None, kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """What the model ran before it was patched, with a mask in that implementation's form."""
    from transformers import AttentionInterface

    name = module.__dict__.get(BEFORE, "sdpa")
    limit = kwargs.get("sliding_window")
    queries, keys = query.shape[2], key.shape[2]
    if is_ours(mask):
        shapes_tell = mask is None and (limit is None or keys < limit) and queries in (1, keys)
        if name == "eager" or (name == "sdpa" and not shapes_tell):
            mask = as_matrix(mask, queries, keys, limit, query.device)
        elif mask is not None:  # flash kernels take the padding alone, and their window and causality as arguments
            where = read_mask(mask)
            assert where is not None  # not None, and ours
            mask = where.positions >= 0
    if name == "eager":
        function = importlib.import_module(type(module).__module__).eager_attention_forward
        if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    else:
        function = AttentionInterface()[name]
    if is_causal is not None:
        kwargs = {**kwargs, "is_causal": is_causal}
    return function(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, make_mask)  # without it, padding is lost silently


class InterfaceHook:
    """Before each forward of the root: choose our implementation again if someone chose another; note the length."""

    def __init__(self, read: SequenceReader, state: RootState, modules: list[nn.Module]) -> None:
        self.read = read
        self.state = state
        self.modules = modules

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _register()  # a model that was pickled with its patch, in a process that has patched nothing yet

    @torch.compiler.disable(reason="attn_plugins looks at the model's settings before its graph begins")
    def __call__(self, root: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        _choose(root, self.modules)
        found = self.read(root, args, kwargs)
        self.state.enter(None if isinstance(found, str) else found, False, found if isinstance(found, str) else UNKNOWN)


def _choose(root: Any, modules: list[nn.Module]) -> None:
    before = root.config._attn_implementation
    if before != NAME:
        for module in modules:
            module.__dict__[BEFORE] = before
        root.set_attn_implementation(NAME)


def _release(root: Any, modules: list[nn.Module], mine: list[nn.Module]) -> None:
    """Take some layers out; with the last one of the root, its former implementation comes back."""
    for module in mine:
        module.__dict__.pop(STATE, None)
    if any(STATE in module.__dict__ for module in modules):
        return
    before = {module.__dict__.pop(BEFORE) for module in modules if BEFORE in module.__dict__}
    if root.config._attn_implementation == NAME:
        for name in before:
            root.set_attn_implementation(name)


class AttentionInterfaceSwap:
    """The interception of transformers' language models."""

    def install(
        self, root: nn.Module, family: Family, state: RootState, layers: list[tuple[Site, Layer]]
    ) -> list[Undo]:
        """All of `layers`, or nothing. The undo list, of partials and bound methods only, is copied with the model.

        Raises:
            TypeError: a model class whose attention does not go through transformers' AttentionInterface.
        """
        model: Any = root
        if not model._can_set_attn_implementation():
            raise TypeError(
                f"{type(root).__name__} does not route its attention through transformers' AttentionInterface"
            )
        _register()
        modules = [site.module for site in family.find_sites(root)]
        mine = [site.module for site, _ in layers]
        undo: list[Undo] = [functools.partial(_release, root, modules, mine)]
        try:
            for site, layer in layers:
                site.module.__dict__[STATE] = layer
            _choose(model, modules)
            hook = InterfaceHook(family.read, state, modules)
            undo.append(root.register_forward_pre_hook(hook, with_kwargs=True, prepend=True).remove)
        except BaseException:
            for step in reversed(undo):
                step()
            raise
        return undo
