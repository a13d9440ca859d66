"""`routed_head_attention` against SDPA over all heads, times the gate, on this CPU, as CSV rows.

    python benchmarks/cpu_routed_heads.py [--quick] [--out benchmarks/results/cpu_routed_heads.csv]

Every token uses the heads of its `active` largest of 8 random scores, as a router's top-k does: each head has a list of
its own, of about that share of the tokens, in random places. Both sides get the same gates, 0 where a head is not
used, and run interleaved; ratios are of medians. Lists, gathering and masks are all made in the timed call. The
tensors lie as a projection leaves them, (B, N, H, D). A wrong result is not timed: each problem is first compared with
dense attention, masked and gated, in float64.
`dense_ms` is SDPA (`enable_gqa`) and one product with the gates, `ours_ms` the operator, `repeated_ms` dense with the
keys repeated beforehand: what `speedup` goes by is the faster. `of_ideal` is the speed-up times the active share:
1 / active is what the operations allow.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attn_plugins.ops import routed_head_attention  # noqa: E402
from benchmarks.rows import write_rows  # noqa: E402
from benchmarks.stopwatch import interleaved  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEADS = 8


def measure(
    causal: bool, tokens: int, head_dim: int, kv_heads: int, dtype: str, share: float, seconds: float
) -> dict[str, object]:
    """One row."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, heads, head_dim, generator=rng).to(DTYPES[dtype]).transpose(1, 2)
        for heads in (HEADS, kv_heads, kv_heads)
    )
    used = torch.rand(1, tokens, HEADS, generator=rng).topk(round(share * HEADS), dim=-1).indices
    gates = torch.zeros(1, tokens, HEADS).scatter_(-1, used, torch.rand(used.shape, generator=rng) + 0.5)
    gates = gates.to(DTYPES[dtype])
    whole_k, whole_v = (t.repeat_interleave(HEADS // kv_heads, dim=1) for t in (k, v))

    def dense() -> torch.Tensor:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=kv_heads != HEADS)
        return out.mul_(gates.transpose(1, 2)[..., None])

    def repeated() -> torch.Tensor:
        out = F.scaled_dot_product_attention(q, whole_k, whole_v, is_causal=causal)
        return out.mul_(gates.transpose(1, 2)[..., None])

    def ours() -> torch.Tensor:
        return routed_head_attention(q, k, v, gates, causal=causal)

    check(q, whole_k, whole_v, gates, causal, ours())
    sides = {"dense": dense, "ours": ours} | ({"repeated": repeated} if kv_heads != HEADS else {})
    times = {"repeated": -1.0} | interleaved(sides, seconds=seconds)
    speedup = min(time for name, time in times.items() if name != "ours" and time > 0) / times["ours"]
    active = (gates != 0).float().mean().item()
    return {
        "causal": causal, "tokens": tokens, "heads": HEADS, "kv_heads": kv_heads, "head_dim": head_dim, "dtype": dtype,
        "active": round(active, 4), **{f"{name}_ms": round(times[name], 3) for name in ("dense", "repeated", "ours")},
        "ideal": round(1 / active, 3), "speedup": round(speedup, 2), "of_ideal": round(speedup * active, 3),
    }  # fmt: skip


def check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gates: torch.Tensor, causal: bool, out: torch.Tensor
) -> None:
    """Compare the last head with the definition in float64."""
    wide = [t[:, -1:].double() for t in (q, k, v)]
    want = F.scaled_dot_product_attention(*wide, is_causal=causal) * gates[:, None, :, -1:].double()
    error = (out[:, -1:].double() - want).abs().max().item()
    # Causal rows at the front see few keys: their outputs are of the size of v, not of a mean of many.
    limit = {torch.float32: 4e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}[q.dtype]
    if not error <= limit:
        raise SystemExit(f"error {error:.2e} above {limit:.0e}; a wrong result is not timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2,048 tokens, head size 64, a second a problem")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu_routed_heads.csv"))
    parser.add_argument("--tokens", nargs="*", type=int, default=[2048, 4096, 8192])
    parser.add_argument("--head-dims", nargs="*", type=int, default=[64, 128])
    parser.add_argument("--kv-heads", nargs="*", type=int, default=[8, 2])
    parser.add_argument("--dtypes", nargs="*", default=["fp32", "bf16"], choices=list(DTYPES))
    parser.add_argument("--active", nargs="*", type=float, default=[0.5, 0.75])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each problem")
    arguments = parser.parse_args()
    sizes = ([2048], [64]) if arguments.quick else (arguments.tokens, arguments.head_dims)
    plan = list(itertools.product((False, True), *sizes, arguments.kv_heads, arguments.dtypes, arguments.active))
    seconds = 1.0 if arguments.quick else arguments.seconds
    write_rows(plan, lambda case: measure(*case, seconds), arguments.out)


if __name__ == "__main__":
    main()
