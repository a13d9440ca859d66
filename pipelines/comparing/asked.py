"""What a person asks to compare: a method with its settings, a recipe, or weights that a method was saved with.

gna                                   the preset for this model, or the method's defaults
gna:quality=fast                      a preset's other setting
vmoba:k_blocks=4,dense_steps=0.2      options of the method and of `patch`
moa:plan=plan.json
recipe.yaml                           what `handle.save` wrote
a/folder                              what `handle.save_weights` wrote, or a model saved with such weights
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attn_plugins import pretrained, recipe, registry
from attn_plugins.handle import PatchHandle
from attn_plugins.patching import patch
from attn_plugins.schedule import Schedule

OPENING, CLOSING = "([{", ")]}"


@dataclass(frozen=True)
class Asked:
    """
    Args:
        label: how tables name it; "" is the method's own name.
        method: as for `patch`.
        settings: keyword arguments of `patch`.
        weights: a folder of a method's weights, which then says all of the above.
    """

    label: str = ""
    method: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    weights: Path | None = None

    def patch(self, obj: object, **always: Any) -> PatchHandle:
        """Patch `obj`; `always` wins over the settings. Weights take their own settings, and no dense steps if none."""
        if self.weights is None:
            return patch(obj, self.method, **{**self.settings, **always})
        handle = pretrained.load(obj, self.weights)
        if always.get("dense_steps") == 0:
            for patched in handle.patches:
                patched.state.schedule = Schedule()
        return handle

    @contextlib.contextmanager
    def patched(self, obj: object, **always: Any) -> Iterator[PatchHandle]:
        """Patched inside the block."""
        handle = self.patch(obj, **always)
        try:
            yield handle
        finally:
            handle.remove()

    def name(self, handle: PatchHandle) -> str:
        """The label, or what the patch turned out to be."""
        return self.label or handle.method


def read(texts: Sequence[str], common: Mapping[str, Any] | None = None) -> list[Asked]:
    """What is typed, as above. `common`: settings of all methods by name; what stands with a method wins.

    Raises:
        ValueError: an unknown method, the same twice, an option that is no NAME=VALUE, settings for weights.
        FileNotFoundError: no such recipe.
    """
    twice = next((text for text in texts if texts.count(text) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is asked for twice: each row needs a setting of its own")
    if not texts:
        raise ValueError("nothing to compare with dense attention: name one or more methods, recipes or folders")
    return [_read(text, common or {}) for text in texts]


def _read(text: str, common: Mapping[str, Any]) -> Asked:
    found = re.fullmatch(r"(.+\.ya?ml|[^:]+)(?::(.*))?", text, re.DOTALL)
    if found is None:
        raise ValueError(f"{text!r}: give a method (gna, gna:window=8x12x12), a recipe file or a folder of weights")
    name, settings = found[1], options(text, found[2] or "")
    if recipe.is_recipe(name):
        recipe.read(name)  # a missing or broken file should fail before a model is loaded
        return Asked(_label(Path(name).stem, found[2]), name, settings)
    if name not in registry.method_names() and Path(name).is_dir():
        if settings:
            raise ValueError(f"{text}: weights bring their own settings; leave {', '.join(settings)} out")
        if not any((Path(name) / file).is_file() for file in ("attn_plugins.json", "config.json")):
            raise ValueError(f"{name}: no weights of a method there (handle.save_weights writes attn_plugins.json)")
        return Asked(Path(name).resolve().name, weights=Path(name))
    return Asked(_label(name, found[2]), registry.method(name).name, {**common, **settings})


def _label(name: str, options: str | None) -> str:
    return f"{name}:{options}" if options else name


def options(text: str, pairs: str) -> dict[str, Any]:
    """`"window=3x4x4,causal=[true, false]"` as keyword options; commas inside brackets are part of a value.

    Sizes such as 3x4x4 become tuples, everything else is read as YAML.

    Raises:
        ValueError: a pair without `=`, or a name given twice. `text` is what the message shows.
    """
    import yaml

    found: dict[str, Any] = {}
    for pair in _split(pairs):
        name, separator, value = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not separator or not name.isidentifier():
            raise ValueError(f"{text}: {pair.strip()!r} is no NAME=VALUE, such as window=8x12x12")
        if name in found:
            raise ValueError(f"{text}: {name} is given twice")
        is_sizes = "x" in value and re.fullmatch(r"\s*-?\d+(x-?\d+)+\s*", value)
        try:
            found[name] = tuple(map(int, value.split("x"))) if is_sizes else yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{text}: {name}={value} cannot be read as a value") from error
    return found


def _split(pairs: str) -> Iterator[str]:
    depth, start = 0, 0
    for place, letter in enumerate(pairs):
        depth += (letter in OPENING) - (letter in CLOSING)
        if letter == "," and depth <= 0:
            yield pairs[start:place]
            start = place + 1
    if pairs:
        yield pairs[start:]
