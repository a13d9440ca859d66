"""What the doctor finds of a model and of each method, and how it is told."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from attn_plugins.report import table

WORTH = 1.1  # a gain below which a patch is not recommended
UNKNOWN = "-"


@dataclass(frozen=True)
class Finding:
    """One method on one model at one size. Gains are of the whole schedule, and None where shapes do not tell.

    applies: it can be patched as it is. why: if not, why not. preset: the settings that would be taken, None where the
    method's own. density: of the patched sites, in the sense of `measure`. bound: the gain if these sites took no time
    (Amdahl); promised: at this density, by an operator that loses nothing; expected: by ours, as far as it was timed
    (`efficiency`, the share of the promised gain of attention alone that it reaches here; None: not timed).
    dense_sites: (kind or reason, how many) of the sites that stay dense. not_more: what keeps the gain down.
    """

    method: str
    kind: str
    applies: bool
    why: str = ""
    preset: str | None = None
    settings: str = ""
    sites: int = 0
    dense_sites: tuple[tuple[str, int], ...] = ()
    measure: str = "density"
    density: float | None = None
    dense_steps: float | None = None
    bound: float | None = None
    promised: float | None = None
    expected: float | None = None
    efficiency: float | None = None
    not_more: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def untrained(self) -> bool:
        """Whether it is for a model as it is: modules have weights that are to be trained or fitted first."""
        return self.kind != "module"


@dataclass
class Diagnosis:
    """Of one model that a family knows.

    model, family: names. sites: how many of each kind. size: in words; tokens: in words. flop_share: attention's part
    of the FLOPs of a forward, time_share: of its time, as estimated from rates that were measured on `machine`.
    preferred: the method that presets recommend. code: what loads the model, as the variable `name`. untested: what is
    amiss with the versions.
    """

    model: str
    family: str
    sites: dict[str, int]
    size: str
    tokens: str
    steps: int
    flop_share: float | None
    time_share: float | None
    machine: str
    preferred: str | None
    findings: list[Finding]
    code: tuple[str, ...] = ()
    name: str = "model"
    quality: str = "balanced"
    untested: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default_factory=tuple)

    @property
    def best(self) -> Finding | None:
        """The method to take, if one is worth it without training: what presets recommend for the model, else the
        fastest that has a preset, else the fastest. Quality is not looked at here, and presets have looked."""
        fit = [row for row in self.findings if row.applies and row.untrained and (row.expected or 0.0) >= WORTH]
        fit.sort(key=lambda row: (row.method != self.preferred, row.preset is None, -(row.expected or 0.0)))
        return fit[0] if fit else None

    @property
    def recommendation(self) -> str:
        """One line."""
        best = self.best
        if best is not None:
            settings = f"preset {best.preset}, {self.quality}" if best.preset else "its own settings, no preset"
            text = f"{best.method} ({settings}): an expected {best.expected:.2f}x of at most {best.bound:.2f}x"
            return f"{text}; what it does to quality, `attn-plugins compare` measures"
        known = [row for row in self.findings if row.applies]
        if not known:
            return "no method applies: leave it dense"
        if all(row.expected is None for row in known):
            return "the gain cannot be told from shapes: measure it with `attn-plugins compare`"
        most = max((row.expected or 0.0 for row in known if row.untrained), default=0.0)
        return f"leave it dense at this size: the most that is expected is {most:.2f}x; see why not more"

    @property
    def paste(self) -> tuple[str, ...]:
        """Python that does what is recommended; nothing where nothing is."""
        best = self.best
        if best is None:
            return ()
        quality = "" if self.quality == "balanced" or not best.preset else f', quality="{self.quality}"'
        call = f'attn_plugins.patch({self.name}, "{best.method}"{quality})'
        return ("import attn_plugins", *self.code, call)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the recommendation among them."""
        return dataclasses.asdict(self) | {"recommendation": self.recommendation, "paste": list(self.paste)}

    def lines(self) -> Iterator[str]:
        """The whole, for people."""
        for text in self.untested:
            yield f"WARNING: {text}"
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.sites.items())
        yield f"{self.model} ({self.family}): attention {kinds}"
        yield f"  size: {self.size}: {self.tokens}"
        yield f"  {self._shares()}"
        yield from (f"  note: {note}" for note in self.notes)
        yield ""
        fit = [row for row in self.findings if row.applies]
        if fit:
            yield from table([_HEAD, *map(_cells, fit)])
            yield ""
            for row in fit:
                yield from _details(row)
        for row in self.findings:
            if not row.applies:
                yield f"{row.method}: does not apply: {row.why}"
        yield ""
        yield f"recommended: {self.recommendation}"
        yield from (f"    {line}" for line in self.paste)

    def _shares(self) -> str:
        if self.flop_share is None:
            return "attention's share: not to be told from shapes (not made of linear layers alone)"
        text = f"attention's share of a dense forward: {self.flop_share:.1%} of the FLOPs"
        if self.time_share is not None:
            text += f", {self.time_share:.1%} of the time (an estimate from {self.machine})"
        return text


_HEAD = ("method", "preset", "sites", "density", "dense steps", "bound", "at this density", "expected here")


def _cells(row: Finding) -> tuple[str, ...]:
    share = UNKNOWN if row.density is None else f"{row.density:.1%}"
    steps = UNKNOWN if row.dense_steps is None else f"{row.dense_steps:.0%}"
    gains = (UNKNOWN if gain is None else f"{gain:.2f}x" for gain in (row.bound, row.promised, row.expected))
    return row.method, row.preset or "none", str(row.sites), share, steps, *gains  # type: ignore[return-value]


def _details(row: Finding) -> Iterator[str]:
    yield f"{row.method}: {row.settings or 'defaults'}"
    for why, count in row.dense_sites:
        yield f"  {count} sites stay dense: {why}"
    if row.not_more:
        yield f"  why not more: {'; '.join(row.not_more)}"
    yield from (f"  note: {note}" for note in row.notes)


def counted(reasons: list[str]) -> tuple[tuple[str, int], ...]:
    """Equal reasons once, with their number."""
    return tuple(Counter(reasons).items())
