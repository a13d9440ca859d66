"""A family: one kind of model, as data.

A family says which classes it is, which of their modules are attention and of what kind, what the sequence of a running
call is made of, and which interception gets between. It knows no method.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from attn_plugins.method import SiteKind, SiteShape
from attn_plugins.runtime import Layer, RootState
from attn_plugins.sequence import Sequence

Undo = Callable[[], None]
SitePattern = tuple[str, SiteKind]
# (root module, positional arguments of its forward, keyword arguments) -> what its self-attention sees, or a sentence
# that says why that cannot be told
SequenceReader = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], "Sequence | str"]
# (root module, attention module) -> what weights for it must be made for, or a sentence that says why none can be
ShapeReader = Callable[[nn.Module, nn.Module], "SiteShape | str"]


@dataclass(frozen=True)
class Site:
    """One attention module of a model: its dotted name, what kind it is, its index among its kind in forward order."""

    name: str
    module: nn.Module
    kind: SiteKind
    index: int


class Interception(Protocol):
    """A way of getting between an attention module and its q, k, v."""

    def install(
        self, root: nn.Module, family: Family, state: RootState, layers: list[tuple[Site, Layer]]
    ) -> list[Undo]:
        """Put `layers` in place; returns what undoes it, to be run in reverse. Installs all of it or nothing.

        Each undo is a bound method or a functools.partial, never a closure: it hangs on the model and is deep-copied
        and pickled with it. Layers hang on their modules as `module.__dict__["_attn_plugins"]`, which is how a second
        method finds a site taken.
        """


@dataclass(frozen=True)
class Family:
    """A row of the supported-models matrix.

    Args:
        name: short and stable, used by presets (`"wan"`).
        title: as people call it ("Wan 2.1 / 2.2").
        library: "diffusers" or "transformers".
        classes: names of root classes; a subclass counts.
        sites: (regular expression matched against the whole module name, kind), first match wins.
        read: what the sequence of a running call is.
        interception: how to get between.
        notes: what a user should know, for the matrix.
        extras: what the interception or `patch` needs to know besides. `min_tokens`: smaller grids stay dense;
            `key_padding`: boolean masks of self- and joint attention are padding, which `read` has made valid lengths;
            `in_parts`: text is attended in calls of its own, which stay dense without a word;
            `time_rises`: the timestep grows towards the picture; `beside`: the model runs beside a pipeline's denoiser
            (a ControlNet) and is patched only by itself; and what an interception names in its own docstring.
        shape: the sizes of an attention module, for methods of kind "module"; None: they are refused.
        sized: a model says which size it is made for, so that its layers' shapes have a grid.
        config: values that `model.config` must have, where the class alone does not tell (the UNets).
    """

    name: str
    title: str
    library: str
    classes: tuple[str, ...]
    sites: tuple[SitePattern, ...]
    read: SequenceReader
    interception: Interception
    notes: str = ""
    extras: Mapping[str, Any] = field(default_factory=dict)
    shape: ShapeReader | None = None
    sized: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)

    def matches(self, model: object) -> bool:
        """By class, and by config where classes are shared."""
        config = getattr(model, "config", None)
        return any(base.__name__ in self.classes for base in type(model).__mro__) and all(
            getattr(config, key, None) == value for key, value in self.config.items()
        )

    def find_sites(self, root: nn.Module) -> list[Site]:
        """The attention modules of `root`, in module order (which is forward order in every family so far)."""
        found: list[Site] = []
        counts: dict[str, int] = {}
        for name, module in root.named_modules():
            for pattern, kind in self.sites:
                if re.fullmatch(pattern, name):
                    found.append(Site(name, module, kind, counts.get(kind, 0)))
                    counts[kind] = counts.get(kind, 0) + 1
                    break
        return found
