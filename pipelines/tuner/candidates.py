"""What may stand in a layer: settings of every registered method that takes such layers, needs no training and runs."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from attn_plugins import presets, registry
from attn_plugins.method import Method
from attn_plugins.patching import patch
from attn_plugins.pipelines.tuner.subject import Place, Subject
from attn_plugins.targets import find


@dataclass(frozen=True)
class Candidate:
    """A setting of a method. `heads`: the query heads that have it (`of`: it for all), the others dense; None: all."""

    method: str
    label: str
    options: Mapping[str, Any]
    heads: tuple[int, ...] | None = None
    of: Candidate | None = None

    def on(self, heads: tuple[int, ...]) -> Candidate | None:
        """The same for some heads alone, where the method can say so."""
        options = registry.method(self.method).on_heads([(heads, self.options)])
        if options is None:
            return None
        return Candidate(self.method, f"{self.label} on heads {heads[0]}-{heads[-1]}", options, heads, self)


@dataclass(frozen=True)
class Single:
    """A preset as `patch` takes it: what a tuned plan stands beside."""

    method: str
    quality: str
    preset: str

    @property
    def label(self) -> str:
        return f"{self.method} {self.preset} {self.quality}"

    @property
    def settings(self) -> dict[str, Any]:
        return {"method": self.method, "quality": self.quality, "preset": self.preset}


def methods_for(subject: Subject, names: Collection[str] | None = None) -> list[Method]:
    """The methods that may be tried: of kinds that need no weights, for a kind of site that the model has.

    Raises:
        ValueError: a name in `names` that is no such method.
    """
    kinds = {place.kind for place in subject.places}
    fitting = []
    for name in registry.method_names():
        method = registry.method(name)
        if method.kind == "module" or method.needs_references or method.needs_prompts:
            continue
        if method.sites & kinds:
            fitting.append(method)
    legal = {method.name for method in fitting}
    unknown = sorted(set(names or ()) - legal)
    if unknown:
        raise ValueError(f"methods {', '.join(unknown)}: to be tried on this model are {', '.join(sorted(legal))}")
    return [method for method in fitting if names is None or method.name in names]


def singles(subject: Subject, methods: Iterable[Method]) -> list[Single]:
    """Every preset that fits the model, at its three qualities."""
    found = []
    for method in methods:
        for target in find(subject.obj):
            for row in presets.available(method.name, target.family.name):
                if row.fits(target.root):
                    found += [Single(method.name, quality, row.name) for quality in presets.QUALITIES]
    return list(dict.fromkeys(found))


def candidates(subject: Subject, methods: Iterable[Method]) -> list[Candidate]:
    """The presets' settings and the methods' own ladders, each once, by method and then as they come."""
    methods = list(methods)
    found: dict[tuple[str, Any], Candidate] = {}
    for single in singles(subject, methods):
        row = next(row for row in presets.available(single.method) if row.name == single.preset)
        _add(found, Candidate(single.method, single.label, dict(row.at(single.quality).options)))
    for method in methods:
        for kind in sorted({place.kind for place in subject.places} & method.sites):
            for options in method.ladder(kind, subject.grid):
                told = " ".join(f"{key}={_told(value)}" for key, value in options.items())
                _add(found, Candidate(method.name, f"{method.name} {told}".strip(), options))
    order = [method.name for method in methods]
    return sorted(found.values(), key=lambda one: order.index(one.method))


def on_head_groups(subject: Subject, found: Iterable[Candidate], groups: int) -> list[Candidate]:
    """Each candidate for each of `groups` runs of heads alone, where all places have as many and the method can."""
    heads = {place.heads for place in subject.places}
    count = heads.pop() if len(heads) == 1 else None
    if groups < 2 or count is None or count % groups:
        return []
    size = count // groups
    runs = [tuple(range(start, start + size)) for start in range(0, count, size)]
    return [one for candidate in found for run in runs if (one := candidate.on(run)) is not None]


def refused(subject: Subject, candidate: Candidate, place: Place, probe: Any) -> str | None:
    """Why a candidate cannot stand at a place, or None: it is patched there, and one forward runs."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            handle = at(subject, candidate, [place.name])
        try:
            subject.again(probe)
        finally:
            handle.remove()
    except (ValueError, TypeError, RuntimeError) as error:  # attn_plugins.runtime.Refused is one
        return str(error).split("\n")[0]
    return None


def at(subject: Subject, candidate: Candidate, names: Collection[str]) -> Any:
    """The handle of a candidate on some sites, in every step; what it cannot take is an error."""
    wanted = frozenset(names)
    return patch(
        subject.obj, candidate.method, layers=lambda site: site.name in wanted, dense_steps=0, min_tokens=0,
        strict=True, **candidate.options,
    )  # fmt: skip


def _add(found: dict[tuple[str, Any], Candidate], candidate: Candidate) -> None:
    config = registry.method(candidate.method).config_class.from_options(**candidate.options)
    found.setdefault((candidate.method, config), candidate)


def _told(value: Any) -> str:
    return "x".join(f"{item:g}" for item in value) if isinstance(value, (list, tuple)) else str(value)
