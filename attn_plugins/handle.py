"""The handle that `patch` returns: what was patched, why, and the way back."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import nn

from attn_plugins import recipe, record, weights
from attn_plugins.patches.attention_interface import BEFORE
from attn_plugins.record import Patched
from attn_plugins.schedule import describe

if TYPE_CHECKING:
    from attn_plugins.measures import Measures
    from attn_plugins.methods.moa.report import LayerCache


class PatchHandle:
    """One method on one or several roots (a pipeline may have two transformers).

    Also a context manager: the patch goes when the block ends. It holds the models weakly.

    Attributes:
        method: the method's name; several, of a recipe of several patches, joined by "+".
        patches: one `Patched` per root and patch, in order.
        measures: what the last `measure` block found; None before the first.
    """

    def __init__(self, rows: list[tuple[nn.Module, Patched]]) -> None:
        self.method = "+".join(dict.fromkeys(patched.method for _, patched in rows))
        self.patches = [patched for _, patched in rows]
        self.measures: Measures | None = None
        self._roots = [weakref.ref(root) for root, _ in rows]

    @property
    def roots(self) -> list[nn.Module]:
        """The patched roots that still exist."""
        return [root for root in (ref() for ref in self._roots) if root is not None]

    @property
    def active(self) -> bool:
        """Whether any of it is still in place."""
        return any(
            row is patched
            for ref, patched in zip(self._roots, self.patches, strict=True)
            if (root := ref()) is not None
            for row in record.patches_of(root)
        )

    def remove(self, keep: Collection[int] = ()) -> None:
        """Take the patch out, exactly; nothing if it is out already. A forward that is running ends dense.

        `keep`: ids of the `Patched` that stay.
        """
        for ref, patched in reversed(list(zip(self._roots, self.patches, strict=True))):
            root = ref()
            if root is not None and id(patched) not in keep:
                record.remove(root, patched)

    def summary(self) -> str:
        """A printable table: sites, config, density, the bound on the whole step."""
        try:
            from attn_plugins import report
        except ImportError:
            return "\n".join(_plain_row(patched) for patched in self.patches)
        return report.summarise(self)

    def explain(self) -> str:
        """Why each layer is sparse or dense, a line each."""
        lines = []
        for ref, patched in zip(self._roots, self.patches, strict=True):
            schedule, minimum = patched.state.schedule, patched.state.min_tokens
            preset = f", preset {patched.preset}" if patched.preset else ""
            lines.append(f"{patched.method} on {patched.family}{preset}")
            if not schedule.always_sparse:
                lines.append(f"  dense for {describe(schedule)}")
            if minimum:
                on_cpu, elsewhere = minimum if isinstance(minimum, tuple) else (minimum, minimum)
                where = f" on a CPU, {elsewhere} elsewhere" if elsewhere != on_cpu else ""
                lines.append(f"  dense where the grid has fewer than {on_cpu} tokens{where}")
            lines += [f"  {layer.name}: {layer.kind}, {patched.method}" for layer in patched.layers]
            lines += [f"  {name}: dense, {why}" for name, why in patched.skipped]
            lines += [f"  dense calls run {name!r}, calls of the method do not" for name in _backends(ref(), patched)]
            lines += [f"  dense so far because {reason}" for reason in sorted(patched.state.warned)]
        return "\n".join(lines)

    def measure(self, rows: int = 64) -> AbstractContextManager[Measures]:
        """Measure what runs sparse inside the block: recall, its oracle, density and relative L1, by layer and step.

            with handle.measure() as measures:
                pipe(...)
            print(measures.table())

        In each sparse call of a patched layer, `rows` query rows of each head are taken, spread evenly over the real
        tokens; dense attention of these is computed exactly, and compared with what the method kept and gave. Outputs
        stay as they are, and so does the random state. Compiled models run eagerly inside the block. `summary()` tells
        the last measures too. What they mean: docs/measures.md.

        Raises:
            ValueError: rows below 1, a patch that is taken out, or layers that are being measured already.
        """
        from attn_plugins.measuring import measure

        return measure(self, rows)

    def report(self, length: int = 8192, batch: int = 1) -> str:
        """What the cache takes at `length` tokens, beside a dense one, layer by layer: of methods with ring caches.

        Raises:
            ValueError: a method that keeps no cache of its own, or a model that is gone.
        """
        from attn_plugins.methods.moa.report import report

        layers, itemsize = self._cache_layers()
        return report(layers, length, batch, itemsize)

    def plot(self, path: str | Path, length: int = 8192) -> Path:
        """Draw how far each head looks back at `length` tokens, layer by layer (needs matplotlib).

        Raises:
            ValueError: as `report`.
        """
        from attn_plugins.methods.moa.report import draw

        return draw(self._cache_layers()[0], length, path)

    def _cache_layers(self) -> tuple[list[LayerCache], int]:
        """The attention layers of the patched model, in order, and the bytes of a number in its cache."""
        from attn_plugins.methods.moa.report import LayerCache

        found: list[LayerCache] = []
        itemsize = 0
        for ref, patched in zip(self._roots, self.patches, strict=True):
            root = ref()
            rules = {layer.name: getattr(layer.processor, "span_rule", None) for layer in patched.layers}
            if root is None or not any(rules.values()):
                continue
            names = {*rules, *(name for name, _ in patched.skipped)}
            modules = [(name, module) for name, module in root.named_modules() if name in names]
            found += [LayerCache.of(name, module, rules.get(name)) for name, module in modules]
            itemsize = next(root.parameters()).element_size()
        if not found:
            raise ValueError(f"{self.method!r} keeps no cache of its own, or its model is gone: nothing to report")
        return found, itemsize

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What the method added to the patched models, by the names of their state dicts; nothing of most methods.

        `[weight for _, weight in handle.named_weights()]` is what to give an optimizer to train it alone.
        """
        for ref, patched in zip(self._roots, self.patches, strict=True):
            root = ref()
            if root is not None:
                yield from weights.named_weights(root, patched)

    def save_weights(self, folder: str | Path) -> Path:
        """Write the method's own weights, and what they belong to, into a folder that `attn_plugins.load` takes.

        `save_pretrained` of the patched model writes them too, beside its own.

        Raises:
            ValueError: a method without weights, or a patch of several models.
        """
        return weights.save(self._only_root(), self.patches[0], folder)

    def load_weights(self, folder: str | Path) -> None:
        """Fill them from a folder of `save_weights` or of `save_pretrained`: all of them, and nothing else.

        Raises:
            ValueError: a folder of another patch, or a patch of several models.
            FileNotFoundError: no such weights there.
        """
        weights.load(self._only_root(), self.patches[0], folder)

    def _only_root(self) -> nn.Module:
        if len(self.patches) != 1 or not self.active:
            state = "patched" if self.active else "not patched any more"
            raise ValueError(
                f"this handle is of {len(self.patches)} models, {state}: weights are saved and loaded for one patched "
                "model; patch it by itself"
            )
        return self.roots[0]

    def save(self, path: str | Path, evidence: Mapping[str, Any] | None = None) -> Path:
        """Write the patch as a recipe, which `patch(obj, path)` takes.

        evidence: where it was measured, and what came of it, in plain values; with `tokens: [least, most]`, of the
        grids, a patch by the recipe says so at other sizes.

        Raises:
            ValueError: roots that were patched differently have no single recipe.
        """
        by_root: dict[int, list[Patched]] = {}
        for number, (ref, patched) in enumerate(zip(self._roots, self.patches, strict=True)):
            by_root.setdefault(id(ref() or number), []).append(patched)
        first, *others = by_root.values()
        if not all(_same(first, rows) for rows in others):
            raise ValueError(
                "the patched models differ in sites or config: patch them one by one, and save each handle"
            )
        return recipe.write(first, path, evidence)

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        sites = sum(len(patched.layers) for patched in self.patches)
        return f"<PatchHandle {self.method}: {sites} sites, {'active' if self.active else 'removed'}>"


def _same(a: list[Patched], b: list[Patched]) -> bool:
    return len(a) == len(b) and all(one.same_as(other) for one, other in zip(a, b, strict=True))


def _backends(root: nn.Module | None, patched: Patched) -> list[str]:
    """The attention of the patched layers' dense calls, where it is known: a backend that was set in diffusers, the
    implementation in transformers. Chosen before a patch or after it, it is not lost; nor does it take over."""
    if root is None:
        return []
    names = set()
    for layer in patched.layers:
        module = root.get_submodule(layer.name)
        processor = getattr(module, "processor", None)
        names.add(getattr(processor, "_attention_backend", None) or module.__dict__.get(BEFORE))
    return sorted(str(getattr(name, "value", name)) for name in names if name is not None)


def _plain_row(patched: Patched) -> str:
    sites = f"{len(patched.layers)} of {len(patched.layers) + len(patched.skipped)} sites"
    return f"{patched.method} on {patched.family}: {sites}, {patched.config}"
