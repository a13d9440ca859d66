"""What enters an attention module, for methods that read it before the module's projections run (routers)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from attn_plugins.patches.family import Undo
from attn_plugins.runtime import Layer


class InputHook:
    """Before an attention module's forward, and after it. A checkpoint's recomputation comes here again."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.layer.begin(module, args[0] if args else kwargs.get("hidden_states"))

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.layer.end()


def listen(module: nn.Module, layer: Layer) -> list[Undo]:
    """Hooks of a layer whose method prepares, of no other; returns what takes them out."""
    if not layer.prepares:
        return []
    hook = InputHook(layer)
    before = module.register_forward_pre_hook(hook, with_kwargs=True)
    return [before.remove, module.register_forward_hook(hook.leave).remove]
