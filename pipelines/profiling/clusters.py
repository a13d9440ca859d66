"""Heads that attend alike: k-means over a few numbers that say what a head's pattern is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from attn_plugins.pipelines.profiling.sums import LayerSums

ROUNDS = 50
FEATURES = ("spread", "own token", "near", "far", "text", "first", "same frame", "other frames, same place")


@dataclass(frozen=True)
class Cluster:
    """Heads (layer name, head), the one nearest to the centre first. centre: the features' means, by name."""

    heads: tuple[tuple[str, int], ...]
    centre: dict[str, float]

    @property
    def title(self) -> str:
        """The pattern in a few words: what takes most of the heads' attention."""
        row = self.centre
        if row["spread"] >= 0.9:
            return "everything alike"
        named = {
            "the prompt": row["text"], "the beginning": row["first"], "the own token": row["own token"],
            "near tokens": row["near"], "far tokens": row["far"],
            "the same place in time": row["other frames, same place"],
        }  # fmt: skip
        ranked = sorted(named, key=lambda name: -named[name])
        most = [f"{name} ({named[name]:.0%})" for name in ranked[:2] if named[name] >= 0.2]
        where = " and ".join(most) or "tokens at middle distances"
        return f"{where}, in their own frame" if row["same frame"] >= 0.7 else where


def features(sums: LayerSums) -> torch.Tensor:
    """(heads, FEATURES) float64 in 0..1: entropy by that of all keys; shares of the mass by where it lies.

    Near is one hop on a grid, and up to a 64th of a text; far is beyond a quarter of the longest axis.
    """
    mass = sums.hops.sum(1).clamp(min=1e-30)
    longest = sums.hops.shape[1]
    near, far = max(1, longest // 64), max(2, longest // 4)
    rows = max(sum(means.rows for means in sums.steps.values()), 1)
    entropy = torch.stack([means.entropy for means in sums.steps.values()]).sum(0) / rows
    whole = mass + sums.text
    video = len(sums.grid) == 3
    frame = sums.axes[0][:, 0] / mass if video else torch.zeros_like(mass)
    plane = 1 - torch.stack([(axis[:, 1:].sum(1) / mass) for axis in sums.axes[1:]]).amax(0) if video else frame
    columns = [
        entropy / math.log(max(math.prod(sums.grid), 2)), sums.own / whole,
        (sums.hops[:, 1 : near + 1].sum(1)) / whole, sums.hops[:, far:].sum(1) / whole,
        sums.text / whole, sums.first / whole if sums.kind == "causal" else torch.zeros_like(whole),
        frame, (plane - frame).clamp(min=0) if video else frame,
    ]  # fmt: skip
    return torch.stack([column.clamp(0, 1) for column in columns], dim=1)


def clusters(layers: dict[str, LayerSums], most: int) -> list[Cluster]:
    """At most `most` groups of heads, the largest first."""
    names = [(name, head) for name, sums in layers.items() for head in range(sums.heads)]
    if not names:
        return []
    points = torch.cat([features(sums) for sums in layers.values() if sums.heads])
    labels, centres = k_means(points, min(most, len(names)))
    found = []
    for number, centre in enumerate(centres):
        members = (labels == number).nonzero().flatten()
        if len(members):
            order = members[(points[members] - centre).norm(dim=1).argsort()]
            row = dict(zip(FEATURES, centre.tolist(), strict=True))
            found.append(Cluster(tuple(names[int(place)] for place in order), row))
    return sorted(found, key=lambda one: -len(one.heads))


def k_means(points: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(labels (n,), centres (k, d)) by Lloyd's rounds from far-apart points; the same points give the same result."""
    chosen = [int((points - points.mean(0)).norm(dim=1).argmin())]
    for _ in range(k - 1):
        away = torch.cdist(points, points[chosen]).amin(1)
        chosen.append(int(away.argmax()))
    centres, labels = points[chosen].clone(), torch.full((len(points),), -1)
    for _ in range(ROUNDS):
        nearest = torch.cdist(points, centres).argmin(1)
        if torch.equal(nearest, labels):
            break
        labels = nearest
        for number in range(k):
            members = points[labels == number]
            if len(members):
                centres[number] = members.mean(0)
    return labels, centres
