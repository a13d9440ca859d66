"""One decoding step over MoA's ring caches, packed per KV head, beside dense attention over a full cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from attn_plugins.ops import decode_attention
from attn_plugins.ops.decode.rings import Rings
from attn_plugins.pipelines.benching.backends.dense import dense_sides
from attn_plugins.pipelines.benching.sides import FORWARD, Built, Prepared, Run, Setting, Side
from benchmarks.gpu_cases.moa import LENGTHS, SHAPES, SINK
from benchmarks.gpu_cases.moa_definition import StepOverRings
from benchmarks.gpu_suite.case import Case

BLOCK = 64  # tokens; a cache is whole blocks, and two at least
# What the heads keep, in turn, as shares of the tokens; "uneven" differs among the query heads of a KV head.
MIXES = {
    "50": (1.0, 0.25, 0.5, 0.25),
    "25": (0.5, 0.125, 0.25, 0.125),
    "uneven": (1.0, 0.5, 0.25, 0.25, 0.5, 0.25, 0.125, 0.125),
}


@dataclass(frozen=True, kw_only=True)
class StepCase(Case):
    """The newest of `tokens` tokens, already written, against what each head keeps.

    Density is the kept tokens over all, so that `share` is the share of what the bytes of keys and values allow. The
    dense sides read a static cache; "growing" copies the cache behind each token, as a DynamicCache does.

    On a GPU each side is replayed as a CUDA graph, as in compiled generation: launching takes longer than a short
    cache does. "ours, launched" is the plain call; "ours, positions" is what padding and static caches need.
    """

    plan: str
    sink: int = SINK
    block: int = BLOCK
    suite: str = "moa_decode"

    @property
    def shape(self) -> str:
        return f"batch {self.batch}, {self.heads} / {self.kv_heads} heads"

    @property
    def option(self) -> str:
        per = "query" if self.plan == "uneven" else "KV"
        return f"keeps {'+'.join(f'{share:g}' for share in MIXES[self.plan])} N by {per} head"

    @property
    def spans(self) -> tuple[int, ...]:
        """Of the query heads, without the sinks."""
        group, mix = self.heads // (self.kv_heads or self.heads), MIXES[self.plan]
        turns = [head if self.plan == "uneven" else head // group for head in range(self.heads)]
        kept = [int(self.tokens * mix[turn % len(mix)]) // self.block * self.block for turn in turns]
        return tuple(max(size, 2 * self.block) - self.sink for size in kept)

    @property
    def density(self) -> float:
        """Bytes of the rings over those of a full cache."""
        kv_heads = self.kv_heads or self.heads
        group = self.heads // kv_heads
        kept = [max(self.spans[head : head + group]) + self.sink for head in range(0, self.heads, group)]
        return sum(kept) / (kv_heads * self.tokens)

    @property
    def nbytes(self) -> int:
        """On the device in half precision: the full cache, its copy that grows, the rings."""
        cache = 2 * 2 * self.batch * (self.kv_heads or self.heads) * self.tokens * max(self.head_dims)
        return int(cache * (2 + self.density))

    def shrunk(self) -> StepCase:
        group = self.heads // (self.kv_heads or self.heads)
        return replace(
            self, tokens=640, heads=4 * group, kv_heads=4, batch=min(self.batch, 2), sink=5, block=16, head_dims=(16,)
        )

    def prepare(self, setting: Setting) -> Prepared:
        generator = torch.Generator(setting.device).manual_seed(0)
        kv_heads = self.kv_heads or self.heads
        q, k, v = (
            torch.randn(
                self.batch, heads, count, setting.head_dim,
                generator=generator, device=setting.device, dtype=setting.dtype,
            )
            for heads, count in ((self.heads, 1), (kv_heads, self.tokens), (kv_heads, self.tokens))
        )  # fmt: skip
        rings = Rings(self.spans, self.sink, k, v)
        rings.write(k, v, 0)
        leaves = q, rings.keys, rings.values, k, v
        rule: dict[str, Any] = {
            "key_positions": rings.positions, "spans": rings.span, "sink": self.sink,
            "query_positions": torch.full((1, 1), self.tokens - 1, device=q.device),
        }  # fmt: skip

        def attend(q, keys, values, *_, **rule):  # type: ignore[no-untyped-def]
            return decode_attention(q, keys, values, ranges=rings.ranges, backend=setting.backend, **rule)

        plain = attend if rings.even else functools.partial(attend, **rule)

        def replayed(run: Run, density: float = self.density) -> Callable[[], Built]:
            return lambda: Built(Replayed(run) if setting.device.type == "cuda" else run, density)

        peers = {"ours, launched": plain} if setting.device.type == "cuda" else {}
        sides = (
            *_dense(setting.device, self.heads // kv_heads, replayed),
            *(Side(name, "peer", lambda run=run: Built(run, self.density)) for name, run in peers.items()),  # type: ignore[misc]
            Side("ours, positions", "peer", replayed(functools.partial(attend, **rule))),
            Side("ours", "ours", replayed(plain)),
        )
        oracle = StepOverRings(leaves, self.spans, self.sink)
        return Prepared(leaves, torch.randn_like(q), oracle, sides, self.density)


class Replayed:
    """A call as a CUDA graph, made anew when other tensors come. Gradients are not replayed."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.graph: torch.cuda.CUDAGraph | None = None
        self.places: list[int] = []
        self.out = torch.empty(0)

    def __call__(self, *leaves: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return self.run(*leaves)
        places = [t.data_ptr() for t in leaves]
        if self.graph is None or places != self.places:
            self._capture(leaves, places)
        assert self.graph is not None  # just captured
        self.graph.replay()
        return self.out

    def _capture(self, leaves: tuple[torch.Tensor, ...], places: list[int]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, and chooses kernels
            for _ in range(3):
                self.run(*leaves)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.out = self.run(*leaves)
        self.graph, self.places = graph, places


def _dense(device: torch.device, group: int, replayed: Callable[..., Callable[[], Built]]) -> list[Side]:
    """Every kernel as models call it, and with the query heads of a group as rows of one head: keys are read once."""

    def as_called(run: Run) -> Run:
        return lambda q, _, __, k, v: run(q, k, v)

    def grouped(run: Run) -> Run:
        def rows(q, _, __, k, v):  # type: ignore[no-untyped-def]
            return run(q.reshape(q.shape[0], k.shape[1], group, -1), k, v).reshape(q.shape)

        return rows

    def later(side: Side, form: Callable[[Run], Run]) -> Callable[[], Built]:
        return lambda: replayed(form(side.build().run), 1.0)()

    def growing(q, _, __, k, v):  # type: ignore[no-untyped-def]
        k, v = (torch.cat([t[:, :, :-1], t[:, :, -1:]], dim=2) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=group > 1)

    sides = [Side(side.name, "dense", later(side, as_called)) for side in dense_sides(device, group)]
    if group > 1:
        sides += [Side(f"{side.name} grouped", "dense", later(side, grouped)) for side in dense_sides(device)]
    return [*sides, Side("growing", "dense", replayed(growing, 1.0))]


def _case(model: str, tokens: int, plan: str, batch: int) -> StepCase:
    heads, kv_heads = SHAPES[model]
    return StepCase(
        f"decode-{model}-{tokens >> 10}k-{plan}-b{batch}", tokens, heads, batch, kv_heads, (128,),
        marks={FORWARD: (0.85, 0.95)}, plan=plan,
    )  # fmt: skip


CASES = (
    *(
        _case(model, tokens, plan, batch)
        for tokens in LENGTHS
        for model in SHAPES
        for plan in ("50", "25")
        for batch in (1, 8)
    ),
    _case("8b", 16384, "uneven", 8),
)
