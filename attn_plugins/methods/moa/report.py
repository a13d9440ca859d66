"""What a patch with spans is worth at a length: its cache beside a dense one, a prefill's pairs, the spans drawn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attn_plugins.methods.moa.plan import shape_of
from attn_plugins.methods.moa.rule import LayerRule

_UNITS = ("B", "KiB", "MiB", "GiB")


@dataclass(frozen=True)
class LayerCache:
    """An attention layer. rule: None where it is not patched. window: the model's own sliding window, if it has one."""

    name: str
    rule: LayerRule | None
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None

    @classmethod
    def of(cls, name: str, module: Any, rule: LayerRule | None) -> LayerCache:
        """Of an attention module of transformers."""
        _, heads, kv_heads = shape_of(module.config)
        kv_heads = heads // module.num_key_value_groups if hasattr(module, "num_key_value_groups") else kv_heads
        dim = getattr(module, "head_dim", None) or module.config.hidden_size // heads
        return cls(name, rule, heads, kv_heads, dim, getattr(module, "sliding_window", None))

    def spans(self, n: int) -> tuple[int, ...]:
        """Tokens that each query head looks back at a length of `n`."""
        spans = (n,) * self.heads if self.rule is None else self.rule.spans(n, self.heads)
        return tuple(min(span, n, self.window or n) for span in spans)

    def dense(self, n: int) -> int:
        """Tokens that all KV heads together keep without a patch."""
        return self.kv_heads * min(n, self.window or n)

    def kept(self, n: int) -> int:
        """Tokens that they keep with it: rings, but where the model has a window of its own."""
        if self.rule is None or self.window is not None:
            return self.dense(n)
        spans, group = self.rule.spans(n, self.heads), self.heads // self.kv_heads
        return sum(max(spans[head : head + group]) + self.rule.sink for head in range(0, self.heads, group))

    def pairs(self, n: int) -> float:
        """Share of a prefill's causal pairs that are computed, by the spans and sinks alone."""
        return 1.0 if self.rule is None else self.rule.pair_fraction(n, self.heads)


def report(layers: list[LayerCache], n: int, batch: int, itemsize: int) -> str:
    """A line for the whole model, and a table of its layers: bytes of keys and values at `n` tokens."""
    if n < 1 or batch < 1:
        raise ValueError(f"length={n}, batch={batch}: give 1 or more")
    rows, totals = [("layer", "spans", "cache", "dense", "share", "pairs")], [0, 0]
    for layer in layers:
        kept, dense = (2 * count * layer.head_dim * itemsize * batch for count in (layer.kept(n), layer.dense(n)))
        spans = layer.spans(n)
        shown = f"{min(spans)}..{max(spans)}" if min(spans) != max(spans) else str(spans[0])
        rows.append((layer.name, shown, _size(kept), _size(dense), f"{kept / dense:.1%}", f"{layer.pairs(n):.1%}"))
        totals = [totals[0] + kept, totals[1] + dense]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    pairs = sum(layer.pairs(n) for layer in layers) / len(layers)
    head = (
        f"cache at {n} tokens, batch {batch}: {_size(totals[0])} of {_size(totals[1])} "
        f"({totals[0] / totals[1]:.1%} of dense); pairs of a prefill: {pairs:.1%}"
    )
    return "\n".join([head, *table])


def draw(layers: list[LayerCache], n: int, path: str | Path) -> Path:
    """The span of every query head at `n` tokens, as a map of layers and heads; a picture, by the path's suffix.

    Raises:
        ImportError: matplotlib is not installed (the extra "plots").
    """
    from matplotlib.figure import Figure

    shares = [[span / n for span in layer.spans(n)] for layer in layers]
    width = max(len(row) for row in shares)
    figure = Figure(figsize=(2.5 + 0.16 * width, 1.8 + 0.16 * len(shares)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
    axes.set_xlabel("query head")
    axes.set_ylabel("layer")
    axes.set_title(f"span of each head, as a share of {n} tokens", fontsize="medium")
    figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=150)
    return Path(path)


def _size(count: float) -> str:
    for unit in _UNITS[:-1]:
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} {_UNITS[-1]}"
