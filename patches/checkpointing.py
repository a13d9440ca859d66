"""Carries the moment of a forward into its recomputation.

Gradient checkpointing runs a block again during backward, when another forward may have come between, or in a thread of
autograd's own. The recomputation must see the grid and the step of its own forward, or its values differ.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from attn_plugins.runtime import RootState, Snapshot

ATTRIBUTE = "_gradient_checkpointing_func"


class Recomputation:
    """A block's call under the moment that was, when it was made."""

    def __init__(self, function: Callable[..., Any], moments: list[tuple[RootState, Snapshot]]) -> None:
        self.function = function
        self.moments = moments

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._under(0, args, kwargs)

    def _under(self, depth: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if depth == len(self.moments):
            return self.function(*args, **kwargs)
        state, snapshot = self.moments[depth]
        with state.use(snapshot):
            return self._under(depth + 1, args, kwargs)


class CarryingCheckpoint:
    """Stands in for a module's checkpointing function, calls it, and carries the moments of all patches of its root."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        self.states: list[RootState] = []

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the recomputation is part of the graph
            return self.original(function, *args, **kwargs)
        moments = [(state, state.snapshot()) for state in self.states]
        return self.original(Recomputation(function, moments), *args, **kwargs)


class Weakly:
    """An object of a model, held weakly (what hangs on a root must not keep it alive), copied and pickled with it."""

    def __init__(self, thing: Any) -> None:
        self.ref: Callable[[], Any] = _nothing if thing is None else weakref.ref(thing)

    def __reduce__(self) -> tuple[Any, ...]:
        return Weakly, (self.ref(),)


def _nothing() -> None:
    """What a dead reference is copied to."""


def checkpointing_modules(root: nn.Module) -> list[Weakly]:
    """The modules that a library gives a checkpointing function to, now or later."""
    return [Weakly(module) for module in root.modules() if hasattr(module, "gradient_checkpointing")]


def carry(modules: list[Weakly], state: RootState) -> None:
    """Make the modules' checkpointing functions carry `state`; does nothing where they do already."""
    for weakly in modules:
        module = weakly.ref()
        function = None if module is None else module.__dict__.get(ATTRIBUTE)
        if module is None or function is None:
            continue
        if not isinstance(function, CarryingCheckpoint):
            function = CarryingCheckpoint(function)
            module.__dict__[ATTRIBUTE] = function
        if all(state is not other for other in function.states):
            function.states.append(state)


def drop(modules: list[Weakly], state: RootState) -> None:
    """Undo `carry`; the last patch to go puts the module's own function back."""
    for weakly in modules:
        module = weakly.ref()
        function = None if module is None else module.__dict__.get(ATTRIBUTE)
        if module is not None and isinstance(function, CarryingCheckpoint):
            function.states = [other for other in function.states if other is not state]
            if not function.states:
                module.__dict__[ATTRIBUTE] = function.original
