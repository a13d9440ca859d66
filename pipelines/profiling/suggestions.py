"""What a profile suggests: windows, spans, heads, and layers to leave dense, as settings that `patch` takes."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from attn_plugins.methods.moa import SpanPlan
from attn_plugins.metrics.hops import kept, least_window
from attn_plugins.pipelines.profiling.result import Profile
from attn_plugins.pipelines.profiling.sums import LayerSums

WIDE = 0.6  # a window of a larger share of the grid gains too little: the layer stays dense
HEADS = 0.9  # share of the summed importance that the active heads of a mixture keep


@dataclass
class Suggestion:
    """One setting.

    method: by name. options: keyword arguments of `patch`. sites: names of the layers; None: all that fit. recall: the
    share of the attention mass that it is expected to keep, of queries like the sampled ones; None for mixtures of
    heads. why: sentences for people. dense: layers that it leaves dense, or nearly so. after: code behind the patch.
    """

    method: str
    options: dict[str, Any]
    sites: list[str] | None = None
    recall: float | None = None
    why: list[str] = field(default_factory=list)
    dense: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)

    @property
    def layers(self) -> Any:
        """`layers` of `patch`."""
        names = frozenset(self.sites or ())
        return None if self.sites is None else (lambda site: site.name in names)

    def save(self, folder: Path, family: str) -> Path:
        """Write what `patch(obj, path)` takes: a recipe."""
        import yaml

        options = {key: _plain(value) for key, value in self.options.items()}
        told: dict[str, Any] = {"method": self.method, "family": family, "options": options, "dense_steps": 0}
        if self.sites is not None:
            told["sites"] = self.sites
        path = folder / f"{self.method}.yaml"
        path.write_text(yaml.safe_dump(told, sort_keys=False, default_flow_style=None, width=110), encoding="utf-8")
        return path


def suggest(profile: Profile, keep: float) -> list[Suggestion]:
    """Settings that keep `keep` of the attention mass of each layer (of each head, in texts).

    Raises:
        ValueError: a share outside 0..1.
    """
    if not 0 < keep < 1:
        raise ValueError(f"keep={keep}: give a share of the attention mass between 0 and 1, such as 0.95")
    found = [_windows(profile, keep), _spans(profile, keep), _heads(profile)]
    return [one for one in found if one is not None]


def needed(profile: Profile, keep: float) -> list[str]:
    """A line for each layer on a grid: the least window that keeps `keep` of its mass, and its share of the grid."""
    lines = []
    for name, sums in profile.layers.items():
        found = window_of(sums, keep) if sums.kind != "causal" else None
        if found is not None:
            size = "x".join(map(str, found[0]))
            lines.append(
                f"{name}: {size} keeps {found[1]:.1%}, {math.prod(found[0]) / math.prod(sums.grid):.0%} of the grid"
            )
    return lines


def window_of(sums: LayerSums, keep: float) -> tuple[tuple[int, ...], float] | None:
    """(window, the share that it keeps) of a layer on a grid: of fewest tokens, text being kept by itself; None where
    rounding leaves too little in any."""
    text = float(sums.text.sum())
    total = float(sums.windows.sum()) + text
    window = least_window(sums.windows, keep * total - text)
    if window is None:
        return None
    held = kept(sums.windows)[tuple(size - 1 for size in window)]
    return window, (float(held) + text) / total


def spans_of(sums: LayerSums, keep: float) -> tuple[list[int], torch.Tensor]:
    """(tokens that each KV head must look back, (heads, N + 1) share that every span keeps) of a layer of a text."""
    total = sums.hops.sum(1, keepdim=True)
    sinks = total - sums.behind.sum(1, keepdim=True)
    share = torch.cat([sinks, sinks + sums.behind.cumsum(1)], dim=1) / total
    least = (share < keep - 1e-12).sum(1)  # the first span that is enough
    per_kv = least.view(sums.kv_heads, -1).amax(1)
    return [max(int(span), 1) for span in per_kv], share


def _windows(profile: Profile, keep: float) -> Suggestion | None:
    grids = {name: sums for name, sums in profile.layers.items() if sums.kind != "causal" and sums.rows}
    if not grids:
        return None
    kind = Counter(sums.kind for sums in grids.values()).most_common(1)[0][0]
    names = [name for name, sums in profile.layers.items() if sums.kind == kind]
    found = {name: window_of(grids[name], keep) for name in names if name in grids}
    dense, windows, shares = [], {}, []
    for name, row in found.items():
        if row is None or math.prod(row[0]) > WIDE * math.prod(grids[name].grid):
            dense.append(name)
        else:
            windows[name] = row[0]
            shares.append(row[1])
    if not windows:
        return None
    usual = Counter(windows.values()).most_common(1)[0][0]
    rows: dict[tuple[int, ...], list[int]] = {}
    for name, window in windows.items():
        if window != usual:
            rows.setdefault(window, []).append(grids[name].index)
    options: dict[str, Any] = {"window": usual, "stride": 1}
    if rows:
        options["per_layer"] = [{"layers": layers, "window": window} for window, layers in rows.items()]
    sizes = {grids[name].grid for name in windows}
    if len(sizes) == 1:
        options["base_size"] = sizes.pop()
    part = sum(math.prod(window) / math.prod(grids[name].grid) for name, window in windows.items()) / len(windows)
    why = [
        f"windows that keep {keep:.0%} of each layer's attention mass: {part:.0%} of the keys in {len(windows)} layers",
        "stride 1 is what was counted; `attn-plugins simulate --useful-strides` names those that cost fewer tiles",
    ]
    return Suggestion("gna", options, list(windows), sum(shares) / len(shares), why, dense)


def _spans(profile: Profile, keep: float) -> Suggestion | None:
    texts = {name: sums for name, sums in profile.layers.items() if sums.kind == "causal" and sums.rows}
    shapes = {(sums.heads, sums.kv_heads) for sums in texts.values()}
    if not texts or len(shapes) > 1 or len(texts) < len(profile.layers):
        return None
    ((heads, kv_heads),) = shapes
    length = max(sums.grid[0] for sums in texts.values())
    found = {name: spans_of(sums, keep) for name, sums in texts.items()}
    alphas = tuple(tuple(min(span + profile.sinks, length) for span in spans) for spans, _ in found.values())
    plan = SpanPlan(
        alphas, tuple((0.0,) * kv_heads for _ in alphas), "kv", heads, kv_heads, sink=profile.sinks,
        model=profile.model, provenance={"profile": f"keeps {keep:g} of each head's mass at {length} tokens"},
    )  # fmt: skip
    shares = []
    for (_, share), rings in zip(found.values(), plan.spans(length).tolist(), strict=True):
        reach = torch.tensor(rings).repeat_interleave(heads // kv_heads).clamp(max=share.shape[1] - 1)
        shares.append(float(share.gather(1, reach[:, None]).mean()))
    wide = [name for name, row in zip(found, alphas, strict=True) if min(row) >= WIDE * length]
    why = [
        f"spans that keep {keep:.0%} of each head's attention mass at {length:,} tokens, behind {profile.sinks} sinks: "
        f"{plan.density(length):.0%} of the cache, {plan.pair_fraction(length):.0%} of the pairs",
        "spans are of this length; `attn-plugins moa-search` finds rules that grow with the text, by what hiding does",
    ]
    if plan.density(length) >= 1.0:
        why.append(f"that is all of a text of {length:,} tokens: nothing is gained at this length")
    from attn_plugins.methods.moa.files import to_mapping

    return Suggestion("moa", {"plan": to_mapping(plan)}, None, sum(shares) / len(shares), why, wide)


def _heads(profile: Profile) -> Suggestion | None:
    parts, sizes = [], []
    for name, sums in profile.layers.items():
        worth = profile.importance(name)
        if worth is not None and sums.kind in ("self", "causal") and sums.heads > 1:
            ranked = worth.clamp(min=0).sort(descending=True).values
            enough = int((ranked.cumsum(0) < HEADS * ranked.sum()).sum()) + 1
            parts.append(min(enough, sums.heads) / sums.heads)
            sizes.append(sums.heads)
    if not parts or len(set(sizes)) > 1:
        return None
    heads = sizes[0]
    active = max(round(sum(parts) / len(parts) * heads), 1) / heads
    if active >= 1:
        return None
    why = [
        f"{HEADS:.0%} of the summed importance is in {active * heads:.0f} of a layer's {heads} heads, mean of the "
        "layers; which ones, a router decides for each token"
    ]
    after = ["attn_plugins.methods.moh.calibrate(handle, batches)  # a few batches of your own inputs"]
    return Suggestion("moh", {"active": active, "router": "ridge"}, None, None, why, after=after)


def code(suggestion: Suggestion, path: Path | None, name: str) -> list[str]:
    """Lines to paste. path: of its recipe; None: its options in full, which a plan of spans is too long for."""
    if path is not None and (suggestion.sites is not None or "plan" in suggestion.options):
        lines = [f"handle = attn_plugins.patch({name}, {str(path)!r})"]
    else:
        given = ", ".join(f"{key}={value!r}" for key, value in suggestion.options.items())
        lines = [f'handle = attn_plugins.patch({name}, "{suggestion.method}", {given})']
    return [*lines, *suggestion.after]


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value
