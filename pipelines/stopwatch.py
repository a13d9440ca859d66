"""How long attention itself takes inside a model: the one interception, with a clock around what it calls."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F

from attn_plugins.handle import PatchHandle
from attn_plugins.measured_call import real_tokens
from attn_plugins.method import AttentionCall, Method, MethodConfig, Processor, SiteKind


def now(device: torch.device) -> float:
    """Seconds, after all work on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type in ("mps", "xpu"):
        torch.accelerator.synchronize()
    return time.perf_counter()


class Stopwatch:
    """Seconds of attention since the last `lap`, and how many calls made them."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls = 0

    def lap(self) -> float:
        """The seconds, and back to zero."""
        seconds, self.seconds, self.calls = self.seconds, 0.0, 0
        return seconds


def attach(watch: Stopwatch, handle: PatchHandle) -> None:
    """Time every layer of a patch, until the patch is taken out. Eager runs only."""
    for patched in handle.patches:
        for layer in patched.layers:
            timed: Any = TimedProcessor(layer.processor, watch)
            layer.processor = timed


class TimedProcessor:
    """Calls `inner` and adds the time to `watch`; in all else it is `inner`, whose caches and routers go on."""

    def __init__(self, inner: Processor, watch: Stopwatch) -> None:
        self.inner = inner
        self.watch = watch

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        start = now(call.q.device)
        out = self.inner(call)
        self.watch.seconds += now(call.q.device) - start
        self.watch.calls += 1
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)


class Dense(Method):
    """PyTorch's own attention over everything real: what a method's time is held against."""

    name = "dense"
    title = "Dense attention"
    kind = "operator"
    paper = "arXiv 1706.03762"
    config_class = MethodConfig
    sites = frozenset({"self", "joint", "cross", "causal"})

    def processor(self, config: MethodConfig, layer_index: int, layer_count: int, kind: SiteKind) -> Processor:
        return DENSE


class DenseProcessor(Processor):
    """For the clock alone: padding of causal calls, capped scores and learned sinks cost nothing, and are left out."""

    def refuses(self, call: AttentionCall) -> str | None:
        return None

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        mask = call.mask
        if mask is None and call.sequence is not None and call.sequence.padded:
            mask = real_tokens(call.sequence).to(call.q.device)[:, None, None]
        queries, keys = call.q.shape[2], call.k.shape[2]
        limit = call.sliding_window if call.sliding_window is not None and call.sliding_window < keys else None
        causal = call.causal and queries > 1  # one query behind a cache sees all keys
        if call.causal and (limit is not None or 1 < queries < keys):
            rows = torch.arange(keys - queries, keys, device=call.q.device)
            back = rows[:, None] - torch.arange(keys, device=call.q.device)
            mask, causal = (back >= 0) & (back < (limit or keys)), False
        return F.scaled_dot_product_attention(
            call.q, call.k, call.v, mask, call.dropout, causal,
            scale=call.scale, enable_gqa=call.q.shape[1] != call.k.shape[1],
        )  # fmt: skip


DENSE = DenseProcessor()
