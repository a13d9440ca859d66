"""What being patched costs where nothing is gained, and what a plan costs to make.

    python benchmarks/overhead.py

Microseconds of an attention call through a patch whose every step is dense, less the same call unpatched (medians of
many interleaved calls on a tiny model); seconds and bytes of a block plan for 115,200 tokens.
"""

from __future__ import annotations

import statistics
import sys
import time
import tracemalloc
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import attn_plugins  # noqa: E402
from attn_plugins.plan.cost import choose_tiles  # noqa: E402
from attn_plugins.plan.neighborhood import neighborhood_plan  # noqa: E402
from attn_plugins.plan.windows import axis_windows  # noqa: E402
from attn_plugins.sequence import Sequence  # noqa: E402


def dense_call_overhead(rounds: int = 400) -> float:
    """Median microseconds that a dense call gains by a patch, over the processor calls of a tiny Wan transformer."""
    from diffusers import WanTransformer3DModel

    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = dict(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=32, num_layers=8, rope_max_seq_len=32,
    )  # fmt: skip
    plain, patched = (WanTransformer3DModel(**settings).eval() for _ in range(2))
    attn_plugins.patch(patched, "gna", window=(1, 2, 2), stride=1, dense_steps=10_000)
    x, t, text = torch.randn(1, 4, 2, 8, 8), torch.tensor([500.0]), torch.randn(1, 4, 16)
    times: dict[str, list[float]] = {"plain": [], "patched": []}
    with torch.no_grad():
        for model in 20 * [plain, patched]:
            model(x, t, text)
        for _ in range(rounds):
            for name, model in (("plain", plain), ("patched", patched)):
                start = time.perf_counter()
                model(x, t, text)
                times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(row) for name, row in times.items()}
    return 1e6 * (median["patched"] - median["plain"]) / settings["num_layers"]  # type: ignore[operator]


def plan_cost(stride: tuple[int, ...], itemsize: int = 2) -> tuple[float, float]:
    """Seconds and MiB of the plan of HunyuanVideo's 30 x 48 x 80 grid, window 18 x 24 x 24."""
    grid = (30, 48, 80)
    axes = axis_windows(grid, (18, 24, 24), stride)
    start = time.perf_counter()
    tiles = choose_tiles(axes, itemsize=itemsize)
    plan = neighborhood_plan(Sequence(grid), axes, tiles.q_tile, tiles.kv_tile)
    seconds = time.perf_counter() - start
    tracemalloc.start()
    plan = neighborhood_plan(Sequence(grid), axes, tiles.q_tile, tiles.kv_tile)
    peak = tracemalloc.get_traced_memory()[1]  # numpy's part; torch's tensors are counted below
    tracemalloc.stop()
    tensors = [plan.lists, plan.full, plan.count, plan.q_start, plan.q_size, plan.kv_start, plan.kv_size]
    tensors += [t for t in (plan.q_order, plan.kv_order) if t is not None]
    kept = sum(t.numel() * t.element_size() for t in tensors)
    return seconds, max(peak, kept) / 2**20


def main() -> None:
    for stride in ((16, 8, 8), (1, 1, 1)):
        seconds, mib = plan_cost(stride)
        print(
            f"plan of 115,200 tokens, stride {'x'.join(map(str, stride))}: {seconds:.2f} s, {mib:.1f} MiB at its peak"
        )
    print(f"dense call through a patch: {dense_call_overhead():+.1f} us (root hook's share included)")


if __name__ == "__main__":
    main()
