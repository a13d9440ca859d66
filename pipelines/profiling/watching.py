"""Between a model's attention and its output while it is profiled: dense, watched, heads switched off on demand."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from attn_plugins.handle import PatchHandle
from attn_plugins.measured_call import _of, dense_view
from attn_plugins.measuring import _eager
from attn_plugins.method import AttentionCall, Processor
from attn_plugins.metrics.recall import attention_rows
from attn_plugins.patching import patch
from attn_plugins.pipelines.profiling.sums import LayerSums
from attn_plugins.pipelines.stopwatch import DENSE, Dense

ROWS = 128  # query rows at a time where PyTorch's own attention does not do


class Watch:
    """What all layers of one model share.

    Attributes:
        recording: whether calls are summed up. step: of the running forward.
        off: the layer whose heads are switched off, and (B, H) bool: those of each item; or None.
        forwards: arguments of the root's forwards that were kept, by step: to be run again.
    """

    def __init__(self, root: nn.Module, clock: Any, rows: int, sinks: int) -> None:
        self.root, self.clock, self.rows, self.sinks = root, clock, rows, sinks
        self.layers: dict[str, LayerSums] = {}
        self.recording = True
        self.step = -1
        self.off: tuple[str, torch.Tensor] | None = None
        self.forwards: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def before(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A hook before each forward of the root."""
        if self.recording:
            self.step = self.step + 1 if self.clock is None else self.clock.position(root, args, kwargs)[0]
            self.forwards.setdefault(self.step, (_copied(args), _copied(dict(kwargs))))

    def __reduce__(self) -> Any:
        raise TypeError("a model that is being profiled cannot be copied: leave the block first")


class WatchingProcessor(Processor):
    """Dense attention of one layer, told to the watch."""

    def __init__(self, watch: Watch, name: str, kind: str, index: int) -> None:
        self.watch, self.name = watch, name
        self.sums = LayerSums(name, kind, watch.sinks, index)
        watch.layers[name] = self.sums

    def refuses(self, call: AttentionCall) -> str | None:
        return None

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        watch = self.watch
        if watch.recording:
            with torch.no_grad(), torch.autocast(call.q.device.type, enabled=False):
                self.sums.add(call, watch.rows, watch.step)
        out = dense(call)
        if watch.off is not None and watch.off[0] == self.name:
            out = out.masked_fill(watch.off[1].to(out.device)[:, :, None, None], 0.0)
        return out


def dense(call: AttentionCall) -> torch.Tensor:
    """(B, H, N, D): what the model itself computes, whatever it adds to plain attention."""
    plain = call.keys is None and call.sliding_window is None and call.softcap is None and call.sinks is None
    if plain and not (call.causal and call.q.shape[2] != call.k.shape[2]):
        return DENSE(call)
    scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
    out = torch.empty_like(call.q)
    group = call.q.shape[1] // call.k.shape[1]
    for rows in torch.arange(call.q.shape[2], device=call.q.device).split(ROWS):
        shown, bias = dense_view(call, rows)
        for b in range(call.q.shape[0]):
            for h in range(call.q.shape[1]):
                given = attention_rows(
                    call.q[b, h, rows], call.k[b, h // group], call.v[b, h // group], _of(shown, b, h), scale,
                    bias=None if bias is None else _of(bias, b, h), softcap=call.softcap,
                    sink=None if call.sinks is None else call.sinks[h],
                )[1]  # fmt: skip
                out[b, h, rows] = given.to(out.dtype)
    return out


@contextlib.contextmanager
def watched(obj: object, rows: int, sinks: int) -> Iterator[list[Watch]]:
    """Watch every self-, joint and causal attention of `obj` inside the block: one watch per model, patched as any.
    Compiled models run eagerly meanwhile, as while they are measured.

    Raises:
        ValueError: what `patch` raises (no family knows it, or it is patched already).
    """
    handle = patch(obj, Dense(), min_tokens=0, layers=_wanted)
    hooks: list[Callable[[], None]] = []
    with _eager:
        try:
            watches = list(_attached(handle, rows, sinks, hooks))
            yield watches
        finally:
            for undo in reversed(hooks):
                undo()
            handle.remove()


def _wanted(site: Any) -> bool:
    return site.kind != "cross"


def _attached(handle: PatchHandle, rows: int, sinks: int, hooks: list[Callable[[], None]]) -> Iterator[Watch]:
    for root, patched in zip(handle.roots, handle.patches, strict=True):
        watch = Watch(root, patched.state.clock, rows, sinks)
        for layer in patched.layers:
            layer.processor = WatchingProcessor(watch, layer.name, layer.kind, layer.index)
        hooks.append(root.register_forward_pre_hook(watch.before, with_kwargs=True).remove)
        yield watch


def _copied(value: Any) -> Any:
    """The tensors of some arguments as they are now: pipelines write on theirs."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, (list, tuple)):
        return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value
    return {key: _copied(item) for key, item in value.items()} if type(value) is dict else value
