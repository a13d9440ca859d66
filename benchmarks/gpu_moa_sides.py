"""A Llama of the true shape with random weights, a plan of spans by a seed, and the caches that decode on it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import attn_plugins
from attn_plugins.methods.moa import SpanPlan
from attn_plugins.patches.caches import ring_cache
from attn_plugins.patches.pending import Pending

# Llama-2-7B's and Llama-3-8B's; "tiny" is the dry run's
SHAPES: dict[str, dict[str, int]] = {
    "7b": {"num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32000},
    "8b": {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256},
}
FULL = {"hidden_size": 4096, "num_hidden_layers": 32}
TINY = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "vocab_size": 64,
}  # fmt: skip
SIXTEENTHS = 16


@dataclass(frozen=True)
class Side:
    """`rings`: patched with the plan. `static`: what it keeps is allocated at once. `compiled`: steps as one graph."""

    name: str
    rings: bool = False
    static: bool = False
    compiled: bool = False


SIDES = (Side("dynamic"), Side("static", static=True), Side("moa", rings=True))
COMPILED = (
    Side("static compiled", static=True, compiled=True),
    Side("moa compiled", rings=True, static=True, compiled=True),
)


def random_llama(name: str, layers: int | None, tokens: int, tiny: bool, dtype: torch.dtype, device: str) -> Any:
    """Made on the device and in `dtype`: in float32 on the host a 7B model takes 28 GB and minutes."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = {**FULL, **SHAPES[name], **(TINY if tiny else {})}
    if layers:
        shape["num_hidden_layers"] = layers
    config = LlamaConfig(**shape, max_position_embeddings=tokens, attn_implementation="sdpa")
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def spread_plan(layers: int, query_heads: int, kv_heads: int, share: float, seed: int) -> SpanPlan:
    """Rules `beta * N` per KV head, in sixteenths, whose mean is `share` in each layer: heads in pairs around it."""
    dice = random.Random(seed)
    total = round(2 * share * SIXTEENTHS)
    if not 2 <= total <= 2 * SIXTEENTHS:
        raise ValueError(f"share={share}: legal is {1 / SIXTEENTHS} to 1")
    betas = []
    for _ in range(layers):
        firsts = [dice.randint(max(1, total - SIXTEENTHS), min(SIXTEENTHS, total - 1)) for _ in range(kv_heads // 2)]
        row = [*firsts, *(total - first for first in firsts), *[total / 2] * (kv_heads % 2)]
        dice.shuffle(row)
        betas.append(tuple(one / SIXTEENTHS for one in row))
    return SpanPlan(tuple((0,) * kv_heads for _ in betas), tuple(betas), "kv", query_heads, kv_heads)


@contextlib.contextmanager
def entered(model: Any, side: Side, plan: SpanPlan) -> Iterator[Callable[..., Any]]:
    """The step of a side: the model's call, patched, compiled, or as it is."""
    patch = attn_plugins.patched(model, "moa", plan=plan) if side.rings else contextlib.nullcontext()
    with patch:
        if not side.compiled:
            yield model
            return
        options: dict[str, Any] = (
            {"mode": "reduce-overhead"} if model.device.type == "cuda" else {"backend": "aot_eager"}
        )
        yield torch.compile(model.__call__, fullgraph=True, **options)


def cache_of(model: Any, side: Side, length: int) -> Any:
    """For texts of up to `length` tokens, as `generate` makes it."""
    from transformers import DynamicCache, StaticCache

    if not side.static:
        return ring_cache(model, length) if side.rings else DynamicCache(config=model.config)
    cache = StaticCache(config=model.config, max_cache_len=length)
    if side.rings:
        model.generate.fill(cache, length)
    return cache


def fill(model: Any, cache: Any, batch: int, tokens: int) -> None:
    """Random keys and values of `tokens` tokens in every layer, the same for all items, so that they take no memory."""
    config = model.config
    generator = torch.Generator(model.device).manual_seed(1)
    for index, layer in enumerate(cache.layers):
        shape = (1, config.num_key_value_heads, tokens, config.hidden_size // config.num_attention_heads)
        key, value = (
            torch.randn(shape, generator=generator, device=model.device, dtype=model.dtype).expand(batch, -1, -1, -1)
            for _ in range(2)
        )
        if isinstance(cache.update(key, value, index)[0], Pending):  # else the layer has taken them in
            layer.ready(config.num_attention_heads, key, value)
            layer.commit(key, value, 0, None)


def decode(step: Callable[..., Any], cache: Any, token: torch.Tensor, count: int) -> torch.Tensor:
    """`count` greedy steps behind `token` (B, 1); nothing is read back."""
    for _ in range(count):
        token = step(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)
    return token


def cache_bytes(cache: Any) -> int:
    """Of all keys and values that it has room for."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def read_bytes(model: Any) -> int:
    """Weights that a step reads: all but the table of embeddings, of which it reads a row."""
    return sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
