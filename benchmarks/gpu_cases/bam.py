"""Soft attention experts (BAM, arXiv 2408.08274) beside dense attention with as many heads, projections included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.attention import sdpa_kernel

from attn_plugins.models.bam import named_class, of
from attn_plugins.pipelines.benching.backends.dense import BACKENDS
from attn_plugins.pipelines.benching.sides import FORWARD, Built, Prepared, Run, Setting, Side
from benchmarks.gpu_cases.bam_definition import SampledExperts
from benchmarks.gpu_cases.moa_decoding import Replayed
from benchmarks.gpu_suite.case import Case

EXPERTS, HEADS, KV_HEADS = 4, 16, 4  # of one expert


@dataclass(frozen=True, kw_only=True)
class ExpertsCase(Case):
    """An attention of a Llama whose `EXPERTS` experts have `HEADS` heads each, H D wide; `heads` counts all of them.

    The baseline is the same layer without router and gates: as many heads, the same weights, one wide output
    projection, by the fastest of PyTorch's kernels. `share` is baseline / ours; its mark is 1 / 1.1. "ours" calls the
    kernel that PyTorch chooses, as a model does. A decoding step writes its key and value into a full cache and reads
    all of it, as a CUDA graph.
    """

    shared: bool
    decode: bool
    suite: str = "bam"

    @property
    def shape(self) -> str:
        step = f"step, batch {self.batch}" if self.decode else "prefill"
        return f"{step}, {EXPERTS} x {self.heads // EXPERTS} / {self.kv_heads} heads"

    @property
    def option(self) -> str:
        return "shared keys and values" if self.shared else "keys and values of each expert"

    def shrunk(self) -> ExpertsCase:
        kv_heads = 2 if self.shared else 2 * EXPERTS
        return replace(
            self, tokens=160, heads=4 * EXPERTS, kv_heads=kv_heads, batch=min(self.batch, 2), head_dims=(16,)
        )

    def prepare(self, setting: Setting) -> Prepared:
        dim, each = setting.head_dim, self.heads // EXPERTS
        generator = torch.Generator(setting.device).manual_seed(0)

        def made(*shape: int, scale: float = 1.0) -> torch.Tensor:
            t = torch.randn(*shape, generator=generator, device=setting.device, dtype=setting.dtype)
            return t * scale

        row = of("llama")
        kv_heads = self.kv_heads or self.heads
        sizes: dict[str, Any] = {"hidden_size": each * dim, "head_dim": dim, "num_hidden_layers": 1}
        wide = row.dense_class("Config")(**sizes, num_attention_heads=self.heads, num_key_value_heads=kv_heads)
        config = named_class("AttnPluginsBamLlamaConfig")(
            **sizes, num_attention_heads=each, num_key_value_heads=kv_heads // (1 if self.shared else EXPERTS),
            num_experts=EXPERTS, attention_experts="shared_kv" if self.shared else "all_params",
        )  # fmt: skip
        for one in (wide, config):
            one._attn_implementation = "sdpa"
        dense = _placed(row.dense_class("Attention")(wide, 0), setting)
        experts = _placed(named_class("AttnPluginsBamLlamaAttention")(config, 0), setting)
        weights = {
            name: made(*getattr(dense, f"{name}_proj").weight.shape, scale=(each * dim) ** -0.5) for name in "qkvo"
        }
        weights["router"] = made(EXPERTS, each * dim, scale=(each * dim) ** -0.5)
        for module, out in ((dense, dense), (experts, experts.mix)):
            for name in "qkv":
                getattr(module, f"{name}_proj").weight.data = weights[name]
            out.o_proj.weight.data = weights["o"]
        experts.mix.router.weight.data = weights["router"]

        length = 1 if self.decode else self.tokens
        x = made(self.batch, length, each * dim)
        places = torch.arange(self.tokens - length, self.tokens, device=setting.device)
        rotation = _rotation(places, dim, setting.dtype)
        cache = tuple(made(self.batch, kv_heads, self.tokens, dim) for _ in range(2)) if self.decode else None

        def called(module: nn.Module) -> Run:
            held = None if cache is None else LastPlace(*cache)
            given: dict[str, Any] = {"position_embeddings": tuple(t[None] for t in rotation), "attention_mask": None}
            return lambda x: module(x, past_key_values=held, **given)[0]

        def built(run: Run) -> Built:
            return Built(Replayed(run) if self.decode and setting.device.type == "cuda" else run, 1.0)

        sides = (
            *(Side(name, "dense", build) for name, build in _by_kernel(called(dense), setting.device, built)),
            Side("ours", "ours", lambda: built(called(experts))),
        )
        oracle = SampledExperts(x, weights, rotation, cache, self.shared, each)
        return Prepared((x,), torch.randn_like(x), oracle, sides, 1.0)


class LastPlace:
    """A cache that is full but for the newest token: what `StaticCache` does in a step, time after time."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.is_grad_enabled():  # a step is not trained through, but the check may ask
            return tuple(torch.cat([old[:, :, :-1], new], 2) for old, new in ((self.keys, k), (self.values, v)))  # type: ignore[return-value]
        self.keys[:, :, -1:] = k
        self.values[:, :, -1:] = v
        return self.keys, self.values


def _placed(module: Any, setting: Setting) -> Any:
    return module.to(setting.device, setting.dtype).eval().requires_grad_(False)


def _rotation(places: torch.Tensor, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    rates = 10_000 ** -(torch.arange(0, dim, 2, device=places.device) / dim)
    angles = (places[:, None] * rates).repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _by_kernel(run: Run, device: torch.device, built: Callable[[Run], Built]) -> list[tuple[str, Callable[[], Built]]]:
    """One side for each kernel of PyTorch; on a CPU there is nothing to choose."""
    if device.type != "cuda":
        return [("sdpa", lambda: built(run))]

    def forced(kind: Any) -> Callable[[], Built]:
        def call(x: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(kind):  # PyTorch raises where this kernel cannot run
                return run(x)

        return lambda: built(call)

    return [(name, forced(kind)) for name, kind in BACKENDS.items()]


def _case(decode: bool, tokens: int, shared: bool, batch: int = 1) -> ExpertsCase:
    kind, keys = "step" if decode else "prefill", "shared" if shared else "each"
    return ExpertsCase(
        f"bam-{kind}-{tokens >> 10}k-{keys}{f'-b{batch}' if batch > 1 else ''}", tokens, EXPERTS * HEADS, batch,
        KV_HEADS if shared else EXPERTS * KV_HEADS, (128,), quick=(decode, tokens, shared) == (False, 8192, True),
        marks={FORWARD: (1 / 1.1, 1 / 1.05)}, shared=shared, decode=decode,
    )  # fmt: skip


CASES = (
    *(_case(False, tokens, shared) for tokens in (2048, 8192) for shared in (False, True)),
    *(_case(True, tokens, shared) for tokens in (8192, 32768) for shared in (False, True)),
    *(_case(True, 4096, shared, batch=8) for shared in (False, True)),
)
