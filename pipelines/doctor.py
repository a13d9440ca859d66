"""What a patch would do to a model, before a weight is loaded: sites, presets, the expected gain and what bounds it.

    found = diagnose(skeleton("wan2.1-1.3b/"), Asked(480, 832, 81))
    print("\\n".join(found[0].lines()))

Each method is really patched onto the model's skeleton and taken out again, so what does not apply is told in the words
of `patch` itself. Gains are estimates: FLOPs of the shapes (metrics/flops.py), at rates measured on this machine.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence as Rows
from dataclasses import replace
from typing import Any

import torch

from attn_plugins import presets, record, registry, report
from attn_plugins.handle import PatchHandle
from attn_plugins.method import Method, SiteKind, SiteShape
from attn_plugins.metrics.flops import StepFlops, step_flops
from attn_plugins.patching import patch
from attn_plugins.pipelines.doctoring.findings import Diagnosis, Finding, counted
from attn_plugins.pipelines.doctoring.machine import Machine, Probe, measure
from attn_plugins.pipelines.doctoring.sizes import Asked, sized, steps_of, tokens_in_words
from attn_plugins.pipelines.doctoring.skeleton import Skeleton
from attn_plugins.pipelines.environment import untested
from attn_plugins.plan.simulator import end_to_end
from attn_plugins.targets import Target, find

SMALL = 0.35  # a share of the time below which attention itself is what bounds the gain
POOR = 0.8  # an operator's efficiency below which it is worth a word
GRID_KINDS = ("self", "joint", "causal")


def diagnose(
    found: Skeleton,
    asked: Asked | None = None,
    *,
    methods: Rows[str] | None = None,
    quality: str = "balanced",
    timed: bool = True,
) -> list[Diagnosis]:
    """One diagnosis per model that can be patched (a pipeline may have two). Nothing is left on them.

    Args:
        found: of `doctoring.skeleton.skeleton`, or `Skeleton(obj, code, name)` of a pipeline or model in memory.
        asked: the size; None: the model's own.
        methods: names; None: all.
        quality: of the presets.
        timed: measure this machine, a second for each method that can be timed; else gains are of FLOPs alone.

    Raises:
        ValueError: no family knows the model, it is patched already, an unknown method, or no size is to be had.
    """
    names = registry.method_names() if methods is None else list(methods)
    known = [registry.method(name) for name in names]
    targets = find(found.obj)
    for target in targets:
        if record.patches_of(target.root):
            raise ValueError(f"{type(target.root).__name__} is patched already: unpatch it first")
    return [_Case(target, found, asked or Asked(), quality, timed).diagnosis(known) for target in targets]


class _Case:
    """One model at one size."""

    def __init__(self, target: Target, found: Skeleton, asked: Asked, quality: str, timed: bool) -> None:
        self.target, self.found, self.quality = target, found, quality
        root, family, _ = target
        self.sites = family.find_sites(root)
        self.sized = sized(target, asked)
        self.sequence = self.sized.sequence
        self.flops: StepFlops = step_flops(root, [(site.name, site.kind) for site in self.sites], self.sequence)
        self.steps = steps_of(found.pipe)
        self.machine: Machine | None = None
        self.probe: Probe | None = None
        kinds: list[SiteKind] = [site.kind for site in self.sites if site.kind in GRID_KINDS]
        if timed and kinds:
            shape = self._shape()
            self.machine, self.probe = measure(kinds[0], self.sequence, shape.head_dim, shape.heads * shape.head_dim)

    def diagnosis(self, methods: list[Method]) -> Diagnosis:
        root, family, _ = self.target
        rows = sorted(map(self._finding, methods), key=lambda row: (not row.applies, -(row.expected or 0.0)))
        kinds = dict(counted([site.kind for site in self.sites]))
        amiss = untested(family.library)
        machine = "" if self.machine is None else self.machine.described
        notes = list(self.found.notes)
        if self.found.written_by:
            notes.append(f"its files were written by {self.found.written_by}")
        return Diagnosis(
            type(root).__name__, family.title, kinds, self.sized.of, tokens_in_words(self.sequence), self.steps,
            self.flops.share, None if self.machine is None else self._time_share(set(self.flops.attention)), machine,
            presets.recommend(family.name, root), rows, self.found.code,
            self.found.name, self.quality, (amiss,) if amiss else (), tuple(notes),
        )  # fmt: skip

    def _finding(self, method: Method) -> Finding:
        root, family, pipe = self.target
        kinds = {site.kind for site in self.sites}
        plain = Finding(method.name, method.kind, False)
        if not kinds & method.sites:
            wanted, has = (", ".join(sorted(names)) for names in (method.sites, kinds))
            return replace(plain, why=f"it is for attention of kind {wanted}; this model has {has}")
        obj = root if pipe is None else pipe
        steps = self.steps if family.library == "diffusers" else None
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                handle = patch(obj, method.name, quality=self.quality, num_steps=steps)
            except (ValueError, TypeError, RuntimeError) as error:
                return replace(plain, why=" ".join(str(error).split()))
        try:
            notes = [str(row.message).removeprefix("attn_plugins: ") for row in said]
            return self._patched(method, handle, [note for note in notes if "is installed" not in note])
        finally:
            handle.remove()

    def _patched(self, method: Method, handle: PatchHandle, notes: list[str]) -> Finding:
        """What a patch that is in place is worth."""
        number = next(index for index, root in enumerate(handle.roots) if root is self.target.root)
        patched = handle.patches[number]
        state = patched.state
        state.last_sequence = self.sequence
        state.min_tokens = self._least(state.min_tokens)  # of this machine, for a skeleton is on no device
        row = report.analyse(handle)[number]
        names = {layer.name for layer in patched.layers}
        share, dense_share = self._time_share(names), state.schedule.dense_share or 0.0
        density = None if row.saved is None else 1 - row.saved
        efficiency, bound, promised, expected = None, None, None, None
        if self.probe is not None and method.kind != "module" and density is not None and density < 1:
            efficiency = self._efficiency(patched, notes)
        if share is not None:
            bound = end_to_end(math.inf, share * (1 - dense_share))
            if density is not None:
                promised = _gain(density, share, dense_share)
                expected = _gain(density / min(efficiency or 1.0, 1.0), share, dense_share)
        return Finding(
            method.name, method.kind, True, "", patched.preset, row.groups[0].config, len(names),
            counted([why for _, why in patched.skipped]), patched.layers[0].processor.measure, density, dense_share,
            bound, promised, expected, efficiency,
            tuple(self._not_more(state.min_tokens, share, dense_share, density, efficiency, names)), tuple(notes),
        )  # fmt: skip

    def _efficiency(self, patched: record.Patched, notes: list[str]) -> float | None:
        """The mean over what is different among its layers, of three at most."""
        assert self.probe is not None
        distinct = list({id(layer.processor): layer.processor for layer in patched.layers}.values())
        try:
            each = [self.probe.efficiency(processor) for processor in distinct[:3]]
        except Exception as error:  # an estimate that fails must not take the report with it
            notes.append(f"its operator was not timed ({type(error).__name__}: {error})")
            return None
        timed = [found for found in each if found is not None]
        if not timed:
            notes.append("its operator was not timed: at a size that is quick to time its setting leaves nothing out")
        return sum(timed) / len(timed) if timed else None

    def _not_more(
        self, least: Any, share: float | None, dense_share: float, density: float | None, efficiency: float | None,
        names: set[str],
    ) -> list[str]:  # fmt: skip
        reasons = []
        if self.sequence.tokens < least:
            reasons.append(
                f"{self.sequence.tokens:,} tokens are fewer than min_tokens={least:,}, below which it stays dense "
                "(min_tokens=0 has it sparse, and probably slower)"
            )
        elif density is not None and density > 0.75:
            reasons.append(f"its setting leaves out only {1 - density:.0%}")
        if share is not None and share < SMALL:
            what = "time" if self.machine else "FLOPs"
            reasons.append(f"attention at these sites is only {share:.0%} of the {what} at this size")
        if dense_share:
            reasons.append(f"{dense_share:.0%} of the steps stay dense")
        if efficiency is not None and efficiency < POOR:
            reasons.append(f"here its operator reaches {efficiency:.0%} of what its density promises")
        rest = [name for name in self.flops.attention if name not in names]
        if rest:
            reasons.append(f"{len(rest)} more attention layers are not patched")
        return reasons

    def _least(self, least: int | tuple[int, int]) -> int:
        gpu = torch.cuda.is_available()
        return least if isinstance(least, int) else least[gpu]

    def _time_share(self, names: set[str]) -> float | None:
        """The share of a dense forward that attention at these sites takes: of the time, or of the FLOPs if untimed."""
        if self.flops.linear is None or not self.flops.attention:
            return None
        mine = sum(flops for name, flops in self.flops.attention.items() if name in names)
        every = sum(self.flops.attention.values())
        if self.machine is None:
            return mine / (every + self.flops.linear)
        return self.machine.seconds(mine, 0.0) / self.machine.seconds(every, self.flops.linear)

    def _shape(self) -> SiteShape:
        root, family, _ = self.target
        for site in self.sites:
            if site.kind in GRID_KINDS and family.shape is not None:
                found = family.shape(root, site.module)
                if not isinstance(found, str):
                    return found
        return SiteShape(16, 64)  # a usual one, where a model does not tell


def _gain(density: float, share: float, dense_share: float) -> float:
    """Of the whole schedule, if the patched sites took `density` of their time."""
    return end_to_end(1 / density if density > 0 else math.inf, share * (1 - dense_share))
