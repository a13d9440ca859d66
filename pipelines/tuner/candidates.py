"""What may stand in a layer: settings of every registered method that takes such layers, needs no training and runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attn_plugins import presets, registry
from attn_plugins.method import Method
from attn_plugins.pipelines.tuner import rows
from attn_plugins.pipelines.tuner.subject import Subject
from attn_plugins.targets import find


@dataclass(frozen=True, eq=False)
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

    @property
    def told(self) -> dict[str, Any]:
        """All that says what runs, in plain values: what the preset holds today."""
        row = next(row for row in presets.available(self.method) if row.name == self.preset).at(self.quality)
        told = {"options": dict(row.options), "layers": row.layers, "dense_steps": row.dense_steps}
        return {**self.settings, **told, "min_tokens": row.min_tokens}

    @property
    def steps(self) -> tuple[float, float]:
        """Shares of the schedule that stay dense, at its start and its end."""
        share = self.told["dense_steps"]
        return share if isinstance(share, tuple) else (share, 0.0)


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
        _add(found, Candidate(single.method, single.label, single.told["options"]))
    for method in methods:
        for kind in sorted({place.kind for place in subject.places} & method.sites):
            for options in method.ladder(kind, subject.grid):
                told = " ".join(f"{key}={_told(value)}" for key, value in options.items())
                _add(found, Candidate(method.name, f"{method.name} {told}".strip(), options))
    order = [method.name for method in methods]
    return sorted(found.values(), key=lambda one: order.index(one.method))


def on_head_groups(subject: Subject, found: Iterable[Candidate], groups: int) -> list[Candidate]:
    """Each candidate for each of `groups` runs of heads alone, where the method can.

    Raises:
        ValueError: layers whose heads are not as many in each, or cannot be shared out among so many groups.
    """
    if groups < 2:
        return []
    heads = {place.heads for place in subject.places}
    count = next(iter(heads))
    if len(heads) > 1 or count is None or count % groups:
        told = ", ".join(sorted(map(str, heads)))
        raise ValueError(
            f"head_groups={groups}: the layers of this model have {told} heads; give 1, or a divisor of all"
        )
    size = count // groups
    runs = [tuple(range(start, start + size)) for start in range(0, count, size)]
    return [one for candidate in found for run in runs if (one := candidate.on(run)) is not None]


def at(
    subject: Subject,
    candidate: Candidate,
    names: Iterable[str],
    dense_steps: Sequence[float] = (0, 0),
    *,
    strict: bool = True,
) -> Any:
    """The handle of a candidate on some sites. strict: what it cannot take is an error."""
    one = rows.row(subject, candidate.method, candidate.options, dense_steps, names)
    return rows.patched(subject, [one], strict=strict)


def _add(found: dict[tuple[str, Any], Candidate], candidate: Candidate) -> None:
    config = registry.method(candidate.method).config_class.from_options(**candidate.options)
    found.setdefault((candidate.method, config), candidate)


def _told(value: Any) -> str:
    plain = isinstance(value, (list, tuple)) and all(isinstance(item, (int, float)) for item in value)
    return "x".join(f"{item:g}" for item in value) if plain else str(value)
