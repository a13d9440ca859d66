"""PAIR, MASKED and GATHER of the CPU cost model (attn_plugins/plan/cost.py), measured on this machine.

    python benchmarks/cpu_primitives.py

For calls of many tiles of T queries and E keys: what a (query, key) pair costs without a mask and with one, in pairs of
dense attention (the bound of any share of the block-level ideal is the inverse of the first); and what fetching a key
costs, in pairs too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attn_plugins.ops.block_sparse.tile_attention import attend  # noqa: E402
from benchmarks.stopwatch import interleaved  # noqa: E402

TOKENS, KEYS, PAIRS = 8192, 1024, 1 << 23
TILES = (32, 64, 128, 192, 256, 512, 768, 1024, 2048)


def main() -> None:
    print(f"threads {torch.get_num_threads()}; in pairs of dense attention of {TOKENS} tokens")
    for dtype in (torch.float32, torch.bfloat16):
        for dim in (64, 128):
            q, k, v = (torch.randn(1, 2, TOKENS, dim, dtype=dtype) for _ in range(3))
            index = torch.arange(TOKENS).view(-1, 16, 4, 8).transpose(1, 2).reshape(-1)  # tiles of a grid: runs of 8
            sides = {
                "dense": lambda q=q, k=k, v=v: attend(q, k, v, None, 0.1),
                "fetch": lambda k=k, index=index: [head.index_select(0, index) for head in k[0]],
            }
            for tile in TILES:
                sides |= {(tile, mask): call(tile, dim, dtype, mask) for mask in (False, True)}
            times = interleaved(sides, seconds=0.5)
            pair = times["dense"] / (2 * TOKENS**2)
            fetch = 2 * times["fetch"] / (2 * TOKENS) / pair  # a key and its value
            print(f"{str(dtype)[6:]} head_dim {dim}: a pair {pair * 1e6:.2f} ns, a key fetched {fetch:.0f} pairs")
            for tile in TILES:
                rows = max(2, PAIRS // (tile * KEYS))
                free, masked = (times[tile, mask] / (rows * tile * KEYS) / pair for mask in (False, True))
                print(f"  T {tile:5d}: {free:.2f} without a mask, {masked:.2f} with one")


def call(tile: int, dim: int, dtype: torch.dtype, masked: bool) -> Callable[[], object]:
    rows = max(2, PAIRS // (tile * KEYS))
    q, k, v = (torch.randn(1, rows, n, dim, dtype=dtype) for n in (tile, KEYS, KEYS))
    bias = torch.zeros(1, 1, tile, KEYS, dtype=dtype) if masked else None
    return lambda: attend(q, k, v, bias, 0.1)


if __name__ == "__main__":
    main()
