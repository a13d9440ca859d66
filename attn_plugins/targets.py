"""From what a person has in hand (a pipeline, a wrapped model, a list) to the models that can be patched."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from attn_plugins import registry
from attn_plugins.patches.family import Family

# where torch.compile, DDP and FSDP keep the model that they wrap
_WRAPPED = ("_orig_mod", "module", "_fsdp_wrapped_module")


class Target(NamedTuple):
    """A root to patch, its family, and the pipeline that it was found in."""

    root: nn.Module
    family: Family
    pipe: object | None


def find(obj: object) -> list[Target]:
    """The models in `obj` that a family knows, each once.

    Of a diffusers pipeline these are its denoisers (`transformer`, `transformer_2`, `unet`, ...): components of a
    diffusers family. Its text encoders are not: they are models of another library's family. Nor are its ControlNets,
    whose families say that they run `beside` a denoiser: give one itself to patch it.

    Raises:
        ValueError: nothing in `obj` belongs to a family; the message names the nearest.
    """
    targets: list[Target] = []
    for target in _walk(obj):
        if all(target.root is not other.root for other in targets):
            targets.append(target)
    if not targets:
        raise ValueError(_nothing(obj))
    return targets


def _walk(obj: object) -> Iterator[Target]:
    if isinstance(obj, (list, tuple)):
        for item in obj:
            yield from find(item)
        return
    components = _components(obj)
    if components is not None:
        for component in components.values():
            found = _unwrapped(component)
            if found is not None and found[1].library == "diffusers" and not found[1].extras.get("beside"):
                yield Target(*found, obj)
        return
    found = _unwrapped(obj)
    if found is None and not isinstance(obj, nn.Module):
        found = _unwrapped(getattr(obj, "model", None))  # a transformers pipeline
    if found is not None:
        yield Target(*found, None)


def _components(obj: object) -> Mapping[str, Any] | None:
    components = None if isinstance(obj, nn.Module) else getattr(obj, "components", None)
    return components if isinstance(components, Mapping) else None


def _unwrapped(model: object) -> tuple[nn.Module, Family] | None:
    """The model inside torch.compile, PEFT, DDP and the like that a family knows."""
    seen: set[int] = set()
    while isinstance(model, nn.Module) and id(model) not in seen:
        seen.add(id(model))
        family = registry.family_of(model)
        if family is not None:
            return model, family
        base = getattr(model, "get_base_model", None)
        inner = [model._modules[name] for name in _WRAPPED if name in model._modules]
        model = base() if callable(base) else inner[0] if inner else None
    return None


def _nothing(obj: object) -> str:
    components = _components(obj)
    models = [obj] if components is None else [c for c in components.values() if isinstance(c, nn.Module)]
    names = [type(model).__name__ for model in models]
    known = {name: family.title for family in registry.families() for name in family.classes}
    near = [match for name in names for match in difflib.get_close_matches(name, list(known), n=2, cutoff=0.5)]
    hint = "; nearest: " + ", ".join(f"{name} ({known[name]})" for name in dict.fromkeys(near)) if near else ""
    what = f"{type(obj).__name__} of {', '.join(names) or 'no models'}" if components is not None else names[0]
    return (
        f"no family of models knows {what}{hint}. Known are {', '.join(sorted(known))}. "
        "attn_plugins.register_family adds one"
    )
