"""Between a transformers attention module and its q, k, v: one name in its AttentionInterface and one in its mask's.

The name is chosen per config, not per layer, so every attention of a patched model comes here; what a layer does hangs
on its module. One that is not patched, or whose call a method refuses, runs what the model ran before. Of a model made
of models (a language model beside a vision tower) only the part that holds the patched layers gets the name.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from attn_plugins.method import AttentionCall
from attn_plugins.patches.causal_mask import as_matrix, is_ours, make_mask, read_mask
from attn_plugins.patches.checkpointing import Weakly, carry, checkpointing_modules, drop
from attn_plugins.patches.family import Family, SequenceReader, Site, Undo
from attn_plugins.patches.inputs import listen
from attn_plugins.patches.pending import STRAY, Pending
from attn_plugins.patches.processor_swap import LevelHook
from attn_plugins.patches.routed_projections import route
from attn_plugins.patches.tensor_parallel import share_of_heads
from attn_plugins.runtime import UNKNOWN, Layer, RootState

NAME = "attn_plugins"
STATE = "_attn_plugins"
BEFORE = "_attn_plugins_before"  # on every module that reads a patched model's config: the implementation it had
# keyword arguments that change what attention is; a method that knows none of them must not be asked
MEANINGFUL = ("position_bias", "cache")


def attention_forward(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
    dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """The function for transformers' AttentionInterface: (B, H, N, D) in, ((B, N, H, D), weights or None) out."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    layer: Layer | None = module.__dict__.get(STATE)
    if isinstance(key, Pending) and isinstance(value, Pending):
        kept = _behind_rings(module, layer, query, key, value, attention_mask, dropout, scaling, causal, kwargs)
        return kept.transpose(1, 2), None
    if layer is not None:
        given = _without_padding(layer, attention_mask)
        reason = _why_dense(module, layer, query, key, given, kwargs)
        if reason is not None:
            layer.root.refuse(reason)
        else:
            q, k, v = (_by_rows(layer, t) for t in (query, key, value))
            share, shares = layer.root.shared_heads or (0, 1)
            heads = query.shape[1]
            out = layer.attend(
                AttentionCall(
                    q, k, v, layer.kind, layer.root.moment.sequence, scaling, None, causal, dropout,
                    keys=read_mask(given), sliding_window=kwargs.get("sliding_window"),
                    softcap=kwargs.get("softcap"), sinks=kwargs.get("s_aux"),
                    first_head=share * heads, layer_heads=shares * heads if shares > 1 else None,
                    weights=layer.weights_of(module), prepared=layer.prepared, watch=layer.watch,
                    extras={"length": layer.root.moment.length},
                )
            )  # fmt: skip
            if out is not None:
                return _by_cells(layer, out).transpose(1, 2), None
    return _dense(module, query, key, value, attention_mask, dropout, scaling, is_causal, causal, kwargs)


def _behind_rings(
    module: nn.Module, layer: Layer | None, query: torch.Tensor, key: Pending, value: Pending, mask: Any,
    dropout: float, scaling: float | None, causal: bool, kwargs: Mapping[str, Any],
) -> torch.Tensor:  # fmt: skip
    """Attention where a ring cache keeps the earlier tokens (caches.py), (B, H, N, D). There is no dense way out."""
    cache, keys = key.layer, read_mask(mask) if is_ours(mask) else None
    if layer is None or getattr(layer.processor, "span_rule", None) != cache.rule:
        raise ValueError(STRAY)
    cache.ready(query.shape[1], key.tensor, value.tensor)
    if keys is not None and not torch.compiler.is_compiling() and cache.fresh:
        keys = replace(keys, positions=keys.positions[:, : query.shape[2]])  # a static cache's have room for more
    call = AttentionCall(
        query, key.tensor, value.tensor, layer.kind, layer.root.moment.sequence, scaling, None, causal, dropout,
        keys=keys, sliding_window=kwargs.get("sliding_window"), softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"), extras={"cache": cache},
    )  # fmt: skip
    reason = _why_dense(module, layer, query, key, None if is_ours(mask) else mask, kwargs)
    reason = reason or layer.processor.refuses(call)
    if reason is not None:
        raise ValueError(
            f"{reason}; a ring cache keeps too little for dense attention: pass past_key_values=DynamicCache(...)"
        )
    return layer.processor(call)


def _without_padding(layer: Layer, mask: Any) -> Any:
    """The mask, or None where the family has read it as valid lengths of the sequence."""
    root = layer.root
    read = layer.on_grid and root.key_padding and root.moment.sequence is not None
    return None if read and isinstance(mask, torch.Tensor) and mask.dtype == torch.bool else mask


def _by_rows(layer: Layer, tokens: torch.Tensor) -> torch.Tensor:
    """(B, H, N, D) of a grid whose tokens come cell by cell, in raster order; nothing to do for the others."""
    sequence = layer.root.moment.sequence
    if layer.cell == 1 or sequence is None or tokens.shape[2] != sequence.length:
        return tokens
    (height, width), side = sequence.grid, layer.cell
    cells = tokens.unflatten(2, (height // side, width // side, side, side))
    return cells.transpose(3, 4).flatten(2, 5)


def _by_cells(layer: Layer, tokens: torch.Tensor) -> torch.Tensor:
    """Back again."""
    sequence = layer.root.moment.sequence
    if layer.cell == 1 or sequence is None:
        return tokens
    (height, width), side = sequence.grid, layer.cell
    rows = tokens.unflatten(2, (height // side, side, width // side, side))
    return rows.transpose(3, 4).flatten(2, 5)


def _why_dense(
    module: nn.Module, layer: Layer, query: torch.Tensor, key: torch.Tensor | Pending, mask: Any,
    kwargs: Mapping[str, Any],
) -> str | None:  # fmt: skip
    for name in MEANINGFUL:
        if kwargs.get(name) is not None:
            return f"the model passes {name} to its attention"
    config = getattr(module, "config", None)
    if kwargs.get("output_attentions") or getattr(config, "output_attentions", False):
        return "output_attentions asks for the dense weights"
    if layer.on_grid and layer.root.moment.sequence is None:
        return layer.root.moment.reason
    if layer.prepares and layer.cell > 1:
        return "the tokens of this layer's input are in another order than those of its queries"
    if not is_ours(mask):
        return "the model passes an attention mask of its own making (4-D, packed sequences or blocks)"
    if layer.on_grid:
        return None  # what else is amiss, `Layer.attend` sees by the sequence
    if mask is not None and mask.shape[-1] != key.shape[2] + 2:
        return f"the cache of this layer holds {key.shape[2]} keys, and the mask is for {mask.shape[-1] - 2}"
    if query.shape[2] > key.shape[2]:
        return f"{query.shape[2]} queries beside {key.shape[2]} keys: not causal self-attention"
    return None


def _dense(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any,
    dropout: float, scaling: float | None, is_causal: bool | None, causal: bool, kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """What the model ran before it was patched, with a mask in that implementation's form."""
    from transformers import AttentionInterface

    plain = kwargs.get("softcap") is None and kwargs.get("s_aux") is None  # sdpa knows neither
    name = module.__dict__.get(BEFORE, "sdpa" if plain else "eager")
    limit = kwargs.get("sliding_window")
    queries, keys = query.shape[2], key.shape[2]
    if causal and is_ours(mask):
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
    """Before each forward of the root: choose our implementation again if someone chose another; read the sequence."""

    def __init__(
        self,
        read: SequenceReader,
        state: RootState,
        owners: list[nn.Module],
        checkpointing: list[Weakly],
        first: nn.Module,
        keeps: bool = False,
    ) -> None:
        self.read = read
        self.state = state
        self.owners = owners
        self.first = first  # of the patched layers
        self.checkpointing = checkpointing
        self.keeps = keeps  # the method has ring caches

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _register()  # a model that was pickled with its patch, in a process that has patched nothing yet

    @torch.compiler.disable(reason="attn_plugins looks at the model's settings before its graph begins")
    def __call__(self, root: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        for owner in self.owners:
            _choose(owner)
        self.state.shared_heads = share_of_heads(self.first)
        carry(self.checkpointing, self.state)
        self.state.begin_forward(root)
        if self.keeps:
            from attn_plugins.patches.caches import note_foreign

            note_foreign(self.state, kwargs.get("past_key_values"))
        found = self.read(root, args, kwargs)
        self.state.enter(None if isinstance(found, str) else found, False, found if isinstance(found, str) else UNKNOWN)


def _find_owners(root: nn.Module, sites: list[nn.Module]) -> list[nn.Module]:
    """The models in `root`, itself included, whose configs these attention modules read: the outermost of each.

    Raises:
        TypeError: an attention that does not go through transformers' AttentionInterface.
    """
    wanted = {id(site.__dict__.get("config")) for site in sites}
    owners: dict[int, Any] = {}
    for module in root.modules():
        config = id(module.__dict__.get("config"))
        if config in wanted and hasattr(module, "set_attn_implementation"):
            owners.setdefault(config, module)
    if len(owners) < len(wanted) or not all(owner._can_set_attn_implementation() for owner in owners.values()):
        raise TypeError(f"{type(root).__name__} does not route its attention through transformers' AttentionInterface")
    return list(owners.values())


def _readers(owner: Any) -> Iterator[nn.Module]:
    """The modules that read the owner's config, every attention among them, patched or not."""
    return (module for module in owner.modules() if module.__dict__.get("config") is owner.config)


def _choose(owner: Any) -> None:
    before = owner.config._attn_implementation
    if before != NAME:
        for module in _readers(owner):
            module.__dict__[BEFORE] = before
        owner.set_attn_implementation(NAME)


def _release(owners: list[Any], mine: list[nn.Module]) -> None:
    """Take some layers out; with the last one of an owner, its former implementation comes back."""
    for module in mine:
        module.__dict__.pop(STATE, None)
    for owner in owners:
        modules = list(_readers(owner))
        if any(STATE in module.__dict__ for module in modules):
            continue
        before = {module.__dict__.pop(BEFORE) for module in modules if BEFORE in module.__dict__}
        if owner.config._attn_implementation == NAME:
            for name in before:
                owner.set_attn_implementation(name)


class AttentionInterfaceSwap:
    """The interception of transformers' models.

    A family's `extras` may have `levels`: {expression over the whole dotted names of the modules where pictures enter:
    reader}, for models whose parts are also called by themselves; and `cells`: the config's name for the side of the
    cells in which a grid's tokens come, cell by cell, instead of row by row.
    """

    def install(
        self, root: nn.Module, family: Family, state: RootState, layers: list[tuple[Site, Layer]]
    ) -> list[Undo]:
        """All of `layers`, or nothing. The undo list, of partials and bound methods only, is copied with the model.

        Raises:
            TypeError: a model class whose attention does not go through transformers' AttentionInterface.
        """
        mine = [site.module for site, _ in layers]
        owners = _find_owners(root, mine)
        _register()
        undo: list[Undo] = [functools.partial(_release, owners, mine)]
        keeps = any(hasattr(layer.processor, "span_rule") for _, layer in layers)
        try:
            if keeps:  # caches of its own: what they are is transformers', which only patched models need
                from attn_plugins.patches import caches

                undo += caches.install(root, state, [(site.module, layer.processor) for site, layer in layers])
            for site, layer in layers:
                layer.cell = getattr(site.module.config, family.extras.get("cells", ""), 1)
                site.module.__dict__[STATE] = layer
                undo += listen(site.module, layer)
                undo += route(root, site.module, layer)
            for owner in owners:
                _choose(owner)
            for names, read in family.extras.get("levels", {}).items():
                entry = LevelHook(read, state)
                for name, module in root.named_modules():
                    if re.fullmatch(names, name):
                        undo.append(module.register_forward_pre_hook(entry, with_kwargs=True, prepend=True).remove)
            # last, to run first: it forgets the call before, and then pictures enter
            checkpointing = checkpointing_modules(root)
            undo.append(functools.partial(drop, checkpointing, state))
            hook = InterfaceHook(family.read, state, owners, checkpointing, mine[0], keeps)
            undo.append(root.register_forward_pre_hook(hook, with_kwargs=True, prepend=True).remove)
        except BaseException:
            for step in reversed(undo):
                step()
            raise
        return undo
