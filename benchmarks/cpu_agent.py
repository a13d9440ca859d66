"""`agent_attention` against SDPA over all keys on this CPU, as CSV rows.

    python benchmarks/cpu_agent.py [--quick] [--out benchmarks/results/cpu_agent.csv]

N tokens of a square latent, N / 16 agents, 8 heads, as in the high-resolution layers of a UNet. The sides run
interleaved; ratios are of medians. A wrong result is not timed: each problem is first compared with the definition in
float64. The token tensors lie as a projection leaves them, (B, N, H, D).
`pool_ms` is the pooling that makes the agents, `agent_ms` the operator, `published_ms` both, with the second scale and
the shortcut of the published Stable Diffusion setting. `ideal` is N / (2 n), what the operations allow; `share` is what
`agent_ms` reaches of it, `share_published` what `published_ms` does, pooling included. `bare_ms` are two calls of SDPA
with the same products, `share_bare` what they reach: about the bound of what is made of PyTorch's kernel.

Beside it, on the same tokens: `kv_pool_ms` (2 x 2 keys averaged), `todo_ms` (ToDo, 2402.13573: every other key per
axis) and `tomesd_ms` (half of the tokens merged, attended to and taken apart again; -1 where tomesd 0.1.3 cannot be
imported).
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attn_plugins.ops import agent_attention  # noqa: E402
from attn_plugins.ops.agent import agent_grid, pool_tokens  # noqa: E402
from benchmarks.rows import write_rows  # noqa: E402
from benchmarks.stopwatch import interleaved  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEADS, RATIO = 8, 16


def measure(tokens: int, head_dim: int, dtype: str, seconds: float) -> dict[str, object]:
    """One row."""
    side = math.isqrt(tokens)
    grid = (side, tokens // side)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, HEADS, head_dim, generator=generator).to(DTYPES[dtype]).transpose(1, 2) for _ in range(3)
    )
    to = agent_grid(grid, tokens // RATIO)
    agents = pool_tokens(q, grid, to)
    setting = {"scale_broadcast": head_dim**-0.15, "shortcut": 0.075}

    def published() -> torch.Tensor:
        return agent_attention(q, k, v, pool_tokens(q, grid, to), **setting)

    def kv_pool() -> torch.Tensor:
        half = (grid[0] // 2, grid[1] // 2)
        return F.scaled_dot_product_attention(q, pool_tokens(k, grid, half), pool_tokens(v, grid, half))

    def todo() -> torch.Tensor:
        few = (t.unflatten(2, grid)[:, :, 1::2, 1::2].flatten(2, 3) for t in (k, v))
        return F.scaled_dot_product_attention(q, *few)

    merging = {"tomesd": lambda: tomesd(q, grid)} if importlib.util.find_spec("tomesd") else {}
    check(q, k, v, agents, agent_attention(q, k, v, agents))
    check(q, k, v, agents, published(), **setting)
    times = interleaved(
        {
            "sdpa": lambda: F.scaled_dot_product_attention(q, k, v),
            "pool": lambda: pool_tokens(q, grid, to),
            "agent": lambda: agent_attention(q, k, v, agents),
            "published": published,
            "bare": lambda: F.scaled_dot_product_attention(q, agents, F.scaled_dot_product_attention(agents, k, v)),
            "kv_pool": kv_pool,
            "todo": todo,
            **merging,
        },
        seconds=seconds,
    )
    count = agents.shape[2]
    ideal, speedup = tokens / (2 * count), times["sdpa"] / times["agent"]
    return {
        "tokens": tokens, "agents": count, "heads": HEADS, "head_dim": head_dim, "dtype": dtype,
        **{f"{name}_ms": round(time, 3) for name, time in ({"tomesd": -1} | times).items()}, "ideal": round(ideal, 3),
        "speedup": round(speedup, 2), "share": round(speedup / ideal, 3),
        "share_bare": round(times["sdpa"] / times["bare"] / ideal, 3),
        "share_published": round(times["sdpa"] / times["published"] / ideal, 3),
    }  # fmt: skip


def tomesd(q: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Queries stand for the layer's input: what is merged is attended to and spread out again."""
    from tomesd.merge import bipartite_soft_matching_random2d

    x = q.transpose(1, 2).flatten(2)
    merge, spread = bipartite_soft_matching_random2d(x, grid[1], grid[0], 2, 2, x.shape[1] // 2, no_rand=True)
    few = merge(x).unflatten(2, (q.shape[1], -1)).transpose(1, 2)
    return spread(F.scaled_dot_product_attention(few, few, few).transpose(1, 2).flatten(2))


def check(  # type: ignore[no-untyped-def]
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, agents: torch.Tensor, out: torch.Tensor, **setting
) -> None:
    """Compare the first head with the definition in float64."""
    wide = [t[:, :1].double() for t in (q, k, v, agents)]
    want = agent_attention(*wide, **setting, backend="reference")
    error = (out[:, :1].double() - want).abs().max().item()
    limit = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[q.dtype]
    if not error <= limit:
        raise SystemExit(f"error {error:.2e} above {limit:.0e}; a wrong result is not timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4,096 tokens, head size 64, half a second a problem")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu_agent.csv"))
    parser.add_argument("--tokens", nargs="*", type=int, default=[4096, 16384])
    parser.add_argument("--head-dims", nargs="*", type=int, default=[64, 40])
    parser.add_argument("--dtypes", nargs="*", default=["fp32", "bf16"], choices=list(DTYPES))
    arguments = parser.parse_args()
    sizes = ([4096], [64]) if arguments.quick else (arguments.tokens, arguments.head_dims)
    plan = list(itertools.product(*sizes, arguments.dtypes))
    seconds = 0.5 if arguments.quick else 10.0
    write_rows(plan, lambda case: measure(*case, seconds), arguments.out)


if __name__ == "__main__":
    main()
