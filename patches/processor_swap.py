"""Installing the interception of diffusers on one root, keeping it in place, and taking it out."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from attn_plugins.patches.checkpointing import Weakly, carry, checkpointing_modules, drop
from attn_plugins.patches.context_parallel import text_is_apart
from attn_plugins.patches.family import Family, SequenceReader, Site, Undo
from attn_plugins.patches.inputs import listen
from attn_plugins.patches.interception import ORIGINAL, STATE, catch_k, catch_q, intercepted, why_not
from attn_plugins.patches.routed_projections import route
from attn_plugins.patches.tensor_parallel import share_of_heads
from attn_plugins.runtime import Layer, RootState


class Swapped:
    """The processors of some attention modules, swapped; knows all that it touched, to give each its class back."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.touched: list[Weakly] = []  # also those that were replaced since: a library may put them back

    def keep(self, state: RootState | None = None) -> None:
        """Swap what is not swapped (again): a library may have replaced processors since.

        Raises:
            TypeError: without `state`, a processor that cannot be got between; with it, that is a refusal.
        """
        for module in self.modules:
            processor = module.processor
            cls = type(processor)
            if ORIGINAL in cls.__dict__:
                continue
            if state is not None and why_not(cls) is not None:
                state.refuse(f"the processor was replaced by {cls.__name__}, which cannot be patched: {why_not(cls)}")
                continue
            processor.__class__ = intercepted(cls)
            self.touched = [*(other for other in self.touched if other.ref() is not None), Weakly(processor)]

    def restore(self) -> None:
        for processor in [*(weakly.ref() for weakly in self.touched), *(module.processor for module in self.modules)]:
            original = type(processor).__dict__.get(ORIGINAL)
            if original is not None:
                processor.__class__ = original
        self.touched = []


class RootHook:
    """Before each forward of the root: heal, read the sequence and the step.

    Never compiled: it may read a tensor's values and a scheduler's state. `torch.compile(model)` and `model.compile()`
    run a root's hooks in eager code before the graph, so this costs no graph break; a function of the user's own that
    is compiled around the model gets one here.
    """

    def __init__(self, read: SequenceReader, state: RootState, swapped: Swapped, checkpointing: list[Weakly]) -> None:
        self.read = read
        self.state = state
        self.swapped = swapped
        self.checkpointing = checkpointing

    @torch.compiler.disable(
        reason="attn_plugins reads token grid and step before the model's graph begins: compile the model itself"
    )
    def __call__(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        state = self.state
        self.swapped.keep(state)
        if getattr(root, "_parallel_config", None) is not None:
            state.text_apart = text_is_apart(root) if state.text_apart is None else state.text_apart
            state.shared_heads = share_of_heads(self.swapped.modules[0])
        carry(self.checkpointing, state)
        state.begin_forward(root)
        found = self.read(root, args, kwargs)
        dense = state.is_dense_step(root, args, kwargs)
        if isinstance(found, str):
            state.enter(None, dense, found)
        else:
            state.enter(found, dense)


class LevelHook:
    """Before each forward of a part that has a grid of its own (a level of a UNet, blocks over time alone)."""

    def __init__(self, read: SequenceReader, state: RootState) -> None:
        self.read = read
        self.state = state

    def __call__(self, level: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        found = self.read(level, args, kwargs)
        dense = self.state.moment.dense
        if isinstance(found, str):
            self.state.enter(None, dense, found)
        else:
            self.state.enter(found, dense)


class InnerLevelHook(LevelHook):
    """A level inside another one: where it ends, the outer grid holds again."""

    def __call__(self, level: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.state.moment.outer = self.state.snapshot()
        super().__call__(level, args, kwargs)

    def leave(self, level: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        moment = self.state.moment
        if moment.outer is not None:
            moment.sequence, moment.dense, moment.reason, moment.parts = moment.outer
            moment.outer = None


def _levels(root: nn.Module, rows: Mapping[str, SequenceReader]) -> Iterator[tuple[nn.Module, SequenceReader]]:
    """The modules whose class is called as a row says, or whose whole dotted name its expression matches."""
    for name, module in root.named_modules():
        for key, read in rows.items():
            if type(module).__name__ == key or re.fullmatch(key, name):
                yield module, read
                break


def _release(module: nn.Module) -> None:
    module.__dict__.pop(STATE, None)


class ProcessorSwap:
    """The interception of all diffusers families.

    For models whose grid changes on the way, a family's `extras` may have `levels`: {class name, or expression over
    module names: reader}; and `inner_levels`, alike, for parts inside of a level, after which its grid holds again.
    `references`: how methods get at reference images beside the text (patches/adapter_references.py,
    patches/adapter_flux.py). `prompts`: how methods put prompts beside the text (patches/longer_text.py).
    """

    def install(
        self, root: nn.Module, family: Family, state: RootState, layers: list[tuple[Site, Layer]]
    ) -> list[Undo]:
        """All of `layers`, or nothing. The undo list holds bound methods and partials: it is copied with the model.

        Raises:
            TypeError: a processor that cannot be got between.
        """
        undo: list[Undo] = []
        try:
            modules = [site.module for site, _ in layers]
            merging = family.extras["references"] if layers[0][1].references is not None else None
            swapped = merging.swapped(modules) if merging else Swapped(modules)
            undo.append(swapped.restore)
            swapped.keep()
            for site, layer in layers:
                undo.append(functools.partial(_release, site.module))
                site.module.__dict__[STATE] = layer
                undo += listen(site.module, layer)
                undo += route(root, site.module, layer)
                if layer.wants_plain:
                    for name, catch in (("norm_q", catch_q), ("norm_k", catch_k)):
                        norm = getattr(site.module, name, None)
                        if isinstance(norm, nn.Module):
                            undo.append(norm.register_forward_pre_hook(catch).remove)
            checkpointing = checkpointing_modules(root)
            undo.append(functools.partial(drop, checkpointing, state))
            carry(checkpointing, state)
            hook = RootHook(family.read, state, swapped, checkpointing)
            undo.append(root.register_forward_pre_hook(hook, with_kwargs=True, prepend=True).remove)
            if merging:
                undo += merging.attach(root, state, layers)
            if state.prompts is not None:
                undo += state.prompts.listen(root, family.read, state)
            for module, read in _levels(root, family.extras.get("levels", {})):
                level_hook = LevelHook(read, state)
                undo.append(module.register_forward_pre_hook(level_hook, with_kwargs=True, prepend=True).remove)
            for module, read in _levels(root, family.extras.get("inner_levels", {})):
                inner = InnerLevelHook(read, state)
                undo.append(module.register_forward_pre_hook(inner, with_kwargs=True, prepend=True).remove)
                undo.append(module.register_forward_hook(inner.leave).remove)
        except BaseException:
            for step in reversed(undo):
                step()
            raise
        return undo
