"""A stand-in method, short and independent of the library's operators: windows by brute force, shrunk to the grid."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch

from attn_plugins.method import AttentionCall, Method, MethodConfig, Processor, SiteKind
from attn_plugins.sequence import Sequence


@functools.cache
def brute_force_mask(sequence: Sequence, window: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    """(N, N) bool of one batch item, straight from the rule: per axis, a window around the middle of the query's group,
    shifted inward at the borders; grid rows see all real text, text rows all that is real, padding nothing."""
    cells = list(itertools.product(*(range(size) for size in sequence.grid)))

    def sees(query: tuple[int, ...], key: tuple[int, ...]) -> bool:
        for x, y, size, wide, step in zip(query, key, sequence.grid, window, stride, strict=True):
            first = (x // step) * step + step // 2 - wide // 2
            first = min(max(first, 0), size - wide)
            if not first <= y < first + wide:
                return False
        return True

    grid = torch.tensor([[sees(query, key) for key in cells] for query in cells])
    mask = torch.ones(sequence.length, sequence.length, dtype=torch.bool)
    first, last = sequence.text_before, sequence.text_before + sequence.tokens
    mask[first:last, first:last] = grid
    real = torch.ones(sequence.length, dtype=torch.bool)
    real[sequence.valid_before : first] = False
    real[last + sequence.valid_after :] = False
    return mask & real[:, None] & real[None, :]


def brute_force(call: AttentionCall, window: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    """Masked attention of each batch item, in float64, padding rows 0."""
    assert call.sequence is not None
    rows = []
    for index in range(call.q.shape[0]):
        mask = brute_force_mask(call.sequence.item(index), window, stride)
        q, k, v = (t[index].double() for t in (call.q, call.k, call.v))
        scores = (q @ k.transpose(-1, -2)) * (call.scale or q.shape[-1] ** -0.5)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num(0.0)
        rows.append(weights @ v)
    return torch.stack(rows)


def shrunk(sequence: Sequence, size: int) -> tuple[int, ...]:
    return tuple(min(size, length) for length in sequence.grid)


@dataclass(frozen=True)
class WindowedConfig(MethodConfig):
    """`size` on every axis; 0 is the whole grid. `first_dense`: that many layers stay dense."""

    size: int = 2
    first_dense: int = 0


class WindowedProcessor(Processor):
    def __init__(self, config: WindowedConfig) -> None:
        self.config = config

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        assert call.sequence is not None
        masks = []
        for index in range(call.q.shape[0]):
            item = call.sequence.item(index)
            masks.append(_mask(item, self.config.size))
        mask = torch.stack(masks)[:, None]
        out = torch.nn.functional.scaled_dot_product_attention(
            call.q, call.k, call.v, mask, scale=call.scale, enable_gqa=call.k.shape[1] != call.q.shape[1]
        )
        return out.transpose(1, 2).contiguous().transpose(1, 2)

    def density(self, sequence: Sequence) -> float:
        return 0.5


@torch.compiler.assume_constant_result
def _mask(item: Sequence, size: int) -> torch.Tensor:
    window = item.grid if size == 0 else shrunk(item, size)
    return brute_force_mask(item, window, (1,) * len(window))


@functools.cache
def _processor(config: WindowedConfig) -> WindowedProcessor:
    return WindowedProcessor(config)


class Windowed(Method):
    name = "windowed"
    title = "windows by brute force"
    kind = "sparse"
    paper = "none"
    config_class = WindowedConfig
    own_settings = frozenset({"size"})

    def processor(self, config: MethodConfig, layer_index: int, layer_count: int, kind: SiteKind) -> Processor | None:
        assert isinstance(config, WindowedConfig)
        return None if layer_index < config.first_dense else _processor(config)


class Recording(Processor):
    """Calls a processor and keeps what went in and came out."""

    def __init__(self, inner: Processor) -> None:
        self.inner = inner
        self.calls: list[tuple[AttentionCall, torch.Tensor]] = []

    def refuses(self, call: AttentionCall) -> str | None:
        return self.inner.refuses(call)

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        out = self.inner(call)
        self.calls.append((call, out))
        return out
