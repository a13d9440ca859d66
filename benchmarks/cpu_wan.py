"""A forward of a Wan-1.3B-shaped random transformer, patched against dense, with the Amdahl bound, as CSV rows.

    python benchmarks/cpu_wan.py [--layers 30] [--grid 21 15 26] [--dtypes bf16] [--out benchmarks/results/cpu_wan.csv]

Heads, head size and widths are those of Wan 2.1 1.3B; weights are random, which a time does not depend on. Dense
and patched forwards and dense attention alone are interleaved; figures are medians. `bound` is the gain if attention
took `density` of its dense time and nothing else were needed: 1 / (1 - share * (1 - density)).
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import attn_plugins  # noqa: E402
from attn_plugins.sequence import Sequence  # noqa: E402
from benchmarks.rows import write_rows  # noqa: E402
from benchmarks.stopwatch import interleaved  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEADS, HEAD_DIM = 12, 128
PUBLISHED = {  # of 480p; on another grid blocks keep their share of it
    "blocks": ((3, -1, -1), (-1, 5, 13), (7, 5, 13)), "k_blocks": (2, 6, 18), "base_size": (21, 30, 52),
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "published, tiles of 128": {**PUBLISHED, "tile": 128},
    "published, large tiles": PUBLISHED,
    "an eighth, large tiles": {"blocks": ((0.05, -1, -1), (-1, 0.25, 0.25), (0.34, 0.34, 0.25)), "k_blocks": 0.125},
}


def transformer(layers: int) -> torch.nn.Module:
    """Wan 2.1 1.3B's shape, with random weights."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=16, out_channels=16,
        text_dim=4096, freq_dim=256, ffn_dim=8960, num_layers=layers, cross_attn_norm=True, rope_max_seq_len=1024,
    ).eval()  # fmt: skip


def measure(name: str, layers: int, grid: tuple[int, ...], dtype: str, rounds: int) -> dict[str, object]:
    """One row."""
    kind = DTYPES[dtype]
    plain = transformer(layers).to(kind)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, grid[0], 2 * grid[1], 2 * grid[2], generator=generator).to(kind)
    text = torch.randn(1, 512, 4096, generator=generator).to(kind)
    inputs = (latents, torch.tensor([500]), text)
    q, k, v = (torch.randn(1, HEADS, math.prod(grid), HEAD_DIM, generator=generator).to(kind) for _ in range(3))

    def patched() -> object:
        with attn_plugins.patched(plain, "vmoba", **SETTINGS[name]):
            return plain(*inputs)

    handle = attn_plugins.patch(plain, "vmoba", **SETTINGS[name])
    shares = [layer.processor.density(Sequence(grid)) for layer in handle.patches[0].layers]
    handle.remove()
    density = sum(shares) / len(shares)
    with torch.no_grad():
        times = interleaved(
            {"dense": lambda: plain(*inputs), "patched": patched,
             "attention": lambda: F.scaled_dot_product_attention(q, k, v)},
            seconds=0, least=rounds,
        )  # fmt: skip
    share = layers * times["attention"] / times["dense"]
    bound, gain = 1 / (1 - share * (1 - density)), times["dense"] / times["patched"]
    return {
        "setting": name, "layers": layers, "grid": "x".join(map(str, grid)), "tokens": math.prod(grid), "dtype": dtype,
        "density": round(density, 4), "dense_ms": round(times["dense"], 1), "patched_ms": round(times["patched"], 1),
        "attention_share": round(share, 3), "bound": round(bound, 3), "speedup": round(gain, 3),
        "of_bound": round(gain / bound, 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--grid", nargs=3, type=int, default=[21, 15, 26], help="tokens, (T, H, W)")
    parser.add_argument("--dtypes", nargs="*", default=["bf16", "fp32"], choices=sorted(DTYPES))
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu_wan.csv"))
    arguments = parser.parse_args()
    plan = list(itertools.product(arguments.settings, arguments.dtypes))
    grid = tuple(arguments.grid)
    write_rows(plan, lambda case: measure(case[0], arguments.layers, grid, case[1], arguments.rounds), arguments.out)


if __name__ == "__main__":
    main()
