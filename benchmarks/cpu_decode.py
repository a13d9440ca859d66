"""`decode_attention` over ragged caches against SDPA over a static dense cache on this CPU, as CSV rows.

    python benchmarks/cpu_decode.py [--quick] [--out benchmarks/results/cpu_decode.csv]

One query per head. A ragged cache gives each KV head a ring of its own: 64 sinks, then an eighth, a quarter, a half or
all of the sequence, as MoA's rules do, mixed so that heads keep `density` of the dense cache together. `Rings` packs
them, as in a model. The sides run interleaved, each over as many caches in turn as a model has layers, or `COLD` bytes
hold, so that every call finds its cache in memory and not in the processor; ratios are of medians. A wrong result is
not timed: each problem is first compared with attention over the kept tokens in float64.

`sdpa_ms` is SDPA as models call it (`enable_gqa`), `grouped_ms` SDPA with the query heads of a group as rows of one
head, `positions_ms` our call with positions, spans and sinks. `speedup` and `of_bytes` (the share that is reached of
1 / density, what the bytes of keys and values allow) are against `sdpa_ms`; `of_bytes_grouped` is against the better of
both, `of_bytes_positions` is that of `positions_ms` against `sdpa_ms`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attn_plugins.ops import decode_attention  # noqa: E402
from attn_plugins.ops.decode.rings import Rings  # noqa: E402
from benchmarks.rows import write_rows  # noqa: E402
from benchmarks.stopwatch import interleaved  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DIM, SINK = 128, 64
LAYERS, COLD = 32, 1 << 29  # so many copies, or as many as take so many bytes
HEADS = ((32, 32), (32, 8))  # query heads, KV heads: as in Vicuna-7B and Llama-3-8B
MIXES = {1.0: (1,), 0.5: (1, 0.25, 0.5, 0.25), 0.25: (0.5, 0.125, 0.25, 0.125)}  # density -> rings of heads in turn


def lengths_of(tokens: int, kv_heads: int, density: float) -> list[int]:
    """Kept tokens of each KV head: a multiple of 64, as plans have them, and of nothing larger unless all are kept."""
    mix = MIXES[density]
    odd = [0 if density == 1.0 else SINK * (head % 5 - 2) for head in range(kv_heads)]
    sizes = [int(tokens * mix[head % len(mix)]) // 64 * 64 + odd[head] for head in range(kv_heads)]
    return [min(max(size, 2 * SINK), tokens) for size in sizes]


def measure(tokens: int, heads: int, kv_heads: int, dtype: str, density: float, seconds: float) -> dict[str, object]:
    """One row."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, n, length, DIM, generator=generator).to(DTYPES[dtype])
        for n, length in ((heads, 1), (kv_heads, tokens), (kv_heads, tokens))
    )
    lengths = lengths_of(tokens, kv_heads, density)
    rings = Rings([length - SINK for length in lengths for _ in range(heads // kv_heads)], SINK, k, v)
    rings.write(k, v, 0)
    packed, ranges = (rings.keys, rings.values), rings.ranges
    rule = {
        "key_positions": rings.positions,
        "query_positions": torch.tensor([[tokens - 1]]),
        "spans": rings.span,
        "sink": SINK,
    }
    # A full ring: the sinks, then the latest tokens.
    slots = [torch.cat([torch.arange(SINK), torch.arange(tokens - n + SINK, tokens)]) for n in lengths]
    check(q, k, v, slots, decode_attention(q, *packed, ranges=ranges))
    check(q, k, v, slots, decode_attention(q, *packed, ranges=ranges, **rule))
    rows = q.view(1, kv_heads, heads // kv_heads, DIM)
    dense, ragged = _layers(k, v), _layers(*packed)
    times = interleaved(
        {
            "sdpa": lambda: F.scaled_dot_product_attention(q, *next(dense), enable_gqa=heads != kv_heads),
            "grouped": lambda: F.scaled_dot_product_attention(rows, *next(dense)),
            "ours": lambda: decode_attention(q, *next(ragged), ranges=ranges),
            "positions": lambda: decode_attention(q, *next(ragged), ranges=ranges, **rule),
        },
        seconds=seconds,
    )
    kept = sum(lengths) / (kv_heads * tokens)
    speedup, best = times["sdpa"] / times["ours"], min(times["sdpa"], times["grouped"])
    return {
        "tokens": tokens, "heads": heads, "kv_heads": kv_heads, "head_dim": DIM, "dtype": dtype,
        "density": round(kept, 4), **{f"{name}_ms": round(time, 3) for name, time in times.items()},
        "speedup": round(speedup, 2), "of_bytes": round(speedup * kept, 3),
        "of_bytes_grouped": round(best / times["ours"] * kept, 3),
        "of_bytes_positions": round(times["sdpa"] / times["positions"] * kept, 3),
    }  # fmt: skip


def _layers(k: torch.Tensor, v: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Copies of a cache, in turn without end."""
    count = min(LAYERS, max(2, COLD // (2 * k.numel() * k.element_size())))
    return itertools.cycle([(k.clone(), v.clone()) for _ in range(count)])


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: list[torch.Tensor], out: torch.Tensor) -> None:
    """Compare with attention over the kept tokens of every head in float64."""
    group = q.shape[1] // k.shape[1]
    error = 0.0
    for head, at in enumerate(slots):
        rows = q[0, head * group : (head + 1) * group].double()
        want = F.scaled_dot_product_attention(rows, k[:, head, at].double(), v[:, head, at].double())
        error = max(error, (out[0, head * group : (head + 1) * group].double() - want).abs().max().item())
    limit = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}[q.dtype]
    if not error <= limit:
        raise SystemExit(f"error {error:.2e} above {limit:.0e}; a wrong result is not timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8,192 tokens, half a second a problem")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu_decode.csv"))
    parser.add_argument("--tokens", nargs="*", type=int, default=[4096, 8192, 16384])
    parser.add_argument("--dtypes", nargs="*", default=["fp32", "bf16"], choices=list(DTYPES))
    arguments = parser.parse_args()
    tokens = [8192] if arguments.quick else arguments.tokens
    plan = list(itertools.product(tokens, HEADS, arguments.dtypes, MIXES))
    seconds = 0.5 if arguments.quick else 3.0
    write_rows(plan, lambda case: measure(case[0], *case[1], *case[2:], seconds), arguments.out)


if __name__ == "__main__":
    main()
