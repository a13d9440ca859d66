"""What a patch leaves on a root: the list of its patches, each with all that undoes it.

The list is copied and pickled with the model, so a copy is patched like its original, with layers and undo steps of its
own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from attn_plugins.method import MethodConfig
from attn_plugins.runtime import Layer, RootState

if TYPE_CHECKING:
    from attn_plugins.handle import PatchHandle

ATTRIBUTE = "_attn_plugins_patches"
SITE_ATTRIBUTE = "_attn_plugins"


@dataclass(eq=False)
class Patched:
    """One method on one root.

    Args:
        method, family, preset: names; no preset is None.
        config: the method's config.
        state: what its layers share; `state.schedule` says which steps stay dense.
        layers: the patched layers, each with `.name`, `.kind`, `.index`, `.processor`.
        skipped: (site name, why it stays dense), for the sites that were not patched.
        undo: what takes it out again, to be run in reverse.
        kept: saved with the model: of methods of kind "module", also where a setting has no weights.
    """

    method: str
    family: str
    config: MethodConfig
    state: RootState
    layers: list[Layer]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    preset: str | None = None
    undo: list[Callable[[], None]] = field(default_factory=list)
    handle: PatchHandle | None = None
    kept: bool = False

    def same_as(self, other: Patched) -> bool:
        """Whether patching `other` on top would change nothing."""
        return self._key() == other._key()

    def _key(self) -> tuple[Any, ...]:
        state = self.state
        names = tuple(layer.name for layer in self.layers)
        return self.method, self.config, state.schedule, state.strict, state.min_tokens, names

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "handle": None}  # a handle belongs to the original


def patches_of(root: nn.Module) -> list[Patched]:
    """The patches on a root, oldest first."""
    return list(root.__dict__.get(ATTRIBUTE, ()))


def add(root: nn.Module, patched: Patched) -> None:
    root.__dict__.setdefault(ATTRIBUTE, []).append(patched)


def remove(root: nn.Module, patched: Patched) -> None:
    """Undo one patch, the last thing first, and leave no trace of it; nothing if it is gone already."""
    rows = root.__dict__.get(ATTRIBUTE, [])
    if all(row is not patched for row in rows):
        return
    for step in reversed(patched.undo):
        step()
    patched.undo.clear()
    rows[:] = [row for row in rows if row is not patched]
    if not rows:
        del root.__dict__[ATTRIBUTE]


def holder(root: nn.Module, site_name: str) -> str | None:
    """The method that holds a site of this root, or None."""
    for patched in patches_of(root):
        if any(layer.name == site_name for layer in patched.layers):
            return patched.method
    return None
