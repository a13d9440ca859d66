"""A layer's soft attention experts (BAM) against dense attention with as many heads, on this CPU, as CSV rows.

    python benchmarks/cpu_bam.py [--quick] [--busy] [--out benchmarks/results/cpu_bam.csv]

One attention of a Llama, random weights, N = 4 experts: with each expert's keys and values, and with shared ones;
beside it a dense attention of N times the heads (the same KV heads as the mixture has, the same width), which is what
the mixture's projections and scores are. Rotation, cache and mask are as the model hands them over; norms and
feed-forwards are outside. "prefill" takes a whole text, "decode" one token behind it, in a static cache. Sides run
interleaved, `ratio` is of medians: ours / dense, router, gates and all. `one_ms` is the dense attention of one expert.
With --busy, for a machine that has other work, times are those that one thread computed (column `clock`).
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
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
    """The attention in a prefill of so many tokens, or in a step behind so many, which overwrites its own last one each
    time. It is called with what its model gave it once.
    """
    from transformers import StaticCache

    ids = torch.randint(64, (1, tokens), generator=torch.Generator().manual_seed(1))
    attention, given = model.layers[0].self_attn, {}
    hook = attention.register_forward_pre_hook(lambda _, args, kwargs: given.update(kwargs), with_kwargs=True)
    if not decode:
        model(input_ids=ids, use_cache=False)
        hook.remove()
        return lambda: attention(**given)[0]
    cache = StaticCache(config=model.config, max_cache_len=tokens + 1)
    model(input_ids=ids, past_key_values=cache)
    length = cache.layers[0].cumulative_length
    before = length.clone()
    model(input_ids=ids[:, :1], past_key_values=cache)
    hook.remove()

    def step() -> torch.Tensor:
        length.copy_(before)
        return attention(**given)[0]

    return step


@torch.no_grad()
def measure(kind: str, tokens: int, dtype: str, shared: bool, seconds: float, busy: bool) -> dict[str, object]:
    """One row."""
    kv_heads = KV_HEADS if shared else EXPERTS * KV_HEADS
    models = {
        "one": model_of(HEADS, KV_HEADS, dtype, None),
        "dense": model_of(EXPERTS * HEADS, kv_heads, dtype, None),
        "ours": model_of(HEADS, KV_HEADS, dtype, shared),
    }
    sides = {name: caller(model, tokens, kind == "decode") for name, model in models.items()}
    out = sides["ours"]()
    if not torch.isfinite(out).all() or torch.equal(out, sides["one"]()) or not torch.equal(out, sides["ours"]()):
        raise SystemExit("a wrong result is not timed")
    times = interleaved(sides, seconds=seconds, clock=time.thread_time if busy else time.perf_counter)
    return {
        "kind": kind, "tokens": tokens, "experts": EXPERTS, "keys": "shared" if shared else "each", "width": WIDTH,
        "heads": HEADS, "kv_heads": KV_HEADS, "dtype": dtype,
        **{f"{name}_ms": round(time, 3) for name, time in times.items()},
        "ratio": round(times["ours"] / times["dense"], 3), "clock": "cpu" if busy else "wall",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1,024 tokens, a second a problem")
    parser.add_argument("--busy", action="store_true", help="one thread, and its own time: the machine has other work")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu_bam.csv"))
    arguments = parser.parse_args()
    if arguments.busy:
        torch.set_num_threads(1)
    tokens = (1024,) if arguments.quick else (1024, 4096)
    cases = list(itertools.product(("prefill", "decode"), tokens, DTYPES, (False, True)))
    seconds = {"prefill": 1.0, "decode": 1.0} if arguments.quick else {"prefill": 3.0, "decode": 10.0}
    write_rows(cases, lambda case: measure(*case, seconds[case[0]], arguments.busy), arguments.out)


if __name__ == "__main__":
    main()
