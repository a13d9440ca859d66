"""Measuring a run while it runs: around each patched layer's processor stands one that looks at a few query rows.

Dense attention of those rows is computed exactly, and compared with what the method kept and gave. Memory stays at a
few rows of all keys. Compiled models run eagerly meanwhile: nothing is compiled for it, and what was compiled is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from attn_plugins.measured_call import measured
from attn_plugins.measures import Measures
from attn_plugins.method import AttentionCall, Processor

if TYPE_CHECKING:
    from attn_plugins.handle import PatchHandle
    from attn_plugins.record import Patched


@contextlib.contextmanager
def measure(handle: PatchHandle, rows: int) -> Iterator[Measures]:
    """See `PatchHandle.measure`."""
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise ValueError(f"rows={rows!r}: give how many query rows of a head to sample; 64 to 256 are usual")
    if not handle.active:
        raise ValueError(f"the patch by {handle.method!r} is taken out: patch again, and measure the new handle")
    pairs = [(number, layer) for number, patched in enumerate(handle.patches) for layer in patched.layers]
    if any(isinstance(layer.processor, MeasuringProcessor) for _, layer in pairs):
        raise ValueError("these layers are being measured already: leave the other `measure` block first")
    measures = handle.measures = Measures([(number, layer.name) for number, layer in pairs], rows)
    hooks = []
    with _eager:
        try:
            steps = [Steps(measures, patched) for patched in handle.patches]
            for ref, own in zip(handle._roots, steps, strict=True):
                if (root := ref()) is not None:
                    hooks.append(root.register_forward_pre_hook(own, with_kwargs=True))
            for number, layer in pairs:
                around: Any = MeasuringProcessor(layer.processor, number, layer.name, steps[number], measures)
                layer.processor = around
            yield measures
        finally:
            for _, layer in pairs:
                processor: Any = layer.processor
                if isinstance(processor, MeasuringProcessor):
                    layer.processor = processor.inner
            for hook in hooks:
                hook.remove()


class _Eager:
    """While any block is open, `torch.compile` is off, and then as it was."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.open = 0
        self.stance: Any = None

    def __enter__(self) -> None:
        with self.lock:
            # where it is not loaded, which takes seconds, nothing has been compiled
            if self.stance is None and "torch._dynamo" in sys.modules:
                self.stance = torch.compiler.set_stance("force_eager")
            self.open += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.open -= 1
            if not self.open and self.stance is not None:
                self.stance.__exit__(None, None, None)
                self.stance = None


_eager = _Eager()


class Steps(threading.local):
    """The step that a thread's forward of one model is in. A hook before each forward."""

    def __init__(self, measures: Measures, patched: Patched) -> None:
        self.measures = measures
        self.patched = patched
        self.now = -1

    def __call__(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        clock = self.patched.state.clock
        self.now = self.now + 1 if clock is None else clock.position(root, args, kwargs)[0]
        self.measures.steps = max(self.measures.steps, self.now + 1)

    def __reduce__(self) -> tuple[Any, ...]:
        return _hook_of_a_copy, ()  # a copy of the model is not measured


class MeasuringProcessor:
    """Calls `inner`, and measures what it did; in all else it is `inner`."""

    def __init__(self, inner: Processor, model: int, layer: str, steps: Steps, measures: Measures) -> None:
        self.inner = inner
        self.measure = inner.measure
        self.model = model
        self.layer = layer
        self.steps = steps
        self.measures = measures

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        asked = dataclasses.replace(call)
        out = self.inner(call)
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() >= 0:
            return out  # in a graph nothing can be looked at; what a checkpoint recomputes was counted in its forward
        with torch.no_grad(), torch.autocast(call.q.device.type, enabled=False):
            shares = measured(asked, out, self.inner, self.measures.rows)
        if shares is not None:
            self.measures.add(self.model, self.layer, max(self.steps.now, 0), shares)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self.inner,)


def _itself(processor: Processor) -> Processor:
    return processor


def _hook_of_a_copy() -> Callable[..., None]:
    return _nothing


def _nothing(root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    pass
