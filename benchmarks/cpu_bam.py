"""A layer's soft attention experts (BAM) against dense attention with as many heads, on this CPU, as CSV rows.

    python benchmarks/cpu_bam.py [--quick] [--out benchmarks/results/cpu_bam.csv]

One attention layer of a Llama, random weights, N = 4 experts: with each expert's keys and values, and with shared ones;
beside it a dense layer of N times the heads (the same KV heads as the mixture has, the same width), which is what the
mixture's projections and scores are. "prefill" takes a whole text, "decode" one token behind it, in a static cache.
Sides run interleaved, `ratio` is of medians: ours / dense, router, gates and all. `one_ms` is the dense layer of one
expert.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attn_plugins.models.bam import named_class  # noqa: E402
from benchmarks.rows import write_rows  # noqa: E402
from benchmarks.stopwatch import interleaved  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WIDTH, HEADS, KV_HEADS, EXPERTS = 1024, 16, 4, 4


def model_of(heads: int, kv_heads: int, dtype: str, shared: bool | None) -> Any:
    """One layer with nearly nothing around it; `shared` None: dense."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": WIDTH, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": WIDTH // HEADS, "vocab_size": 64,
        "max_position_embeddings": 1 << 15,
    }  # fmt: skip
    if shared is None:
        return LlamaModel(LlamaConfig(**sizes)).eval().to(DTYPES[dtype])
    config = named_class("AttnPluginsBamLlamaConfig")(
        **sizes, num_experts=EXPERTS, attention_experts="shared_kv" if shared else "all_params"
    )
    return named_class("AttnPluginsBamLlamaModel")(config).eval().to(DTYPES[dtype])


def caller(model: Any, tokens: int, decode: bool) -> Callable[[], torch.Tensor]:
    """A prefill of so many tokens, or a step behind so many, which overwrites its own last one each time."""
    from transformers import StaticCache

    ids = torch.randint(64, (1, tokens), generator=torch.Generator().manual_seed(1))
    if not decode:
        return lambda: model(input_ids=ids, use_cache=False)[0]
    cache = StaticCache(config=model.config, max_cache_len=tokens + 1)
    model(input_ids=ids, past_key_values=cache)
    kept = [layer.cumulative_length.clone() for layer in cache.layers]

    def step() -> torch.Tensor:
        for layer, length in zip(cache.layers, kept, strict=True):
            layer.cumulative_length.copy_(length)
        return model(input_ids=ids[:, :1], past_key_values=cache)[0]

    return step


@torch.no_grad()
def measure(kind: str, tokens: int, dtype: str, shared: bool, seconds: float) -> dict[str, object]:
    """One row."""
    kv_heads = KV_HEADS if shared else EXPERTS * KV_HEADS
    models = {
        "one": model_of(HEADS, KV_HEADS, dtype, None),
        "dense": model_of(EXPERTS * HEADS, kv_heads, dtype, None),
        "ours": model_of(HEADS, KV_HEADS, dtype, shared),
    }
    sides = {name: caller(model, tokens, kind == "decode") for name, model in models.items()}
    out = sides["ours"]()
    if not torch.isfinite(out).all() or torch.equal(out, sides["one"]()):
        raise SystemExit("a wrong result is not timed")
    times = interleaved(sides, seconds=seconds)
    return {
        "kind": kind, "tokens": tokens, "experts": EXPERTS, "keys": "shared" if shared else "each", "width": WIDTH,
        "heads": HEADS, "kv_heads": KV_HEADS, "dtype": dtype,
        **{f"{name}_ms": round(time, 3) for name, time in times.items()},
        "ratio": round(times["ours"] / times["dense"], 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1,024 tokens, a second a problem")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu_bam.csv"))
    arguments = parser.parse_args()
    tokens = (1024,) if arguments.quick else (1024, 4096)
    cases = list(itertools.product(("prefill", "decode"), tokens, DTYPES, (False, True)))
    write_rows(cases, lambda case: measure(*case, 1.0 if arguments.quick else 3.0), arguments.out)


if __name__ == "__main__":
    main()
