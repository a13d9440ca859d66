"""The two constants of the CPU cost model (attn_plugins/plan/cost.py), measured on this machine.

    python benchmarks/cpu_primitives.py

Prints, for tiles of T queries and E keys: the share of dense attention's speed that a call over gathered tiles reaches
(gathering inside), the overhead `g` that this means in (query, key) pairs a key, and the factor that a mask costs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attn_plugins.ops.block_sparse.tile_attention import attend  # noqa: E402
from benchmarks.stopwatch import interleaved  # noqa: E402

TOKENS, KEYS = 8192, 2048


def main() -> None:
    print(f"threads {torch.get_num_threads()}; dtype head_dim T: share of dense, g, mask factor")
    for dtype in (torch.float32, torch.bfloat16):
        for dim in (64, 128):
            q, k, v = (torch.randn(1, 1, TOKENS, dim, dtype=dtype) for _ in range(3))
            for tile in (64, 128, 256, 512, 1024):
                index = torch.randint(0, TOKENS, (KEYS,))
                tiles = q[:, :, :tile]
                bias = torch.zeros(1, 1, tile, KEYS, dtype=dtype)
                bias[..., ::5] = float("-inf")

                def run(bias: torch.Tensor | None) -> None:
                    keys, values = (t[0, 0].index_select(0, index)[None, None] for t in (k, v))  # noqa: B023
                    attend(tiles, keys, values, bias, 0.1)  # noqa: B023

                sides = {"free": lambda: run(None), "masked": lambda: run(bias)}  # noqa: B023
                times = interleaved({"dense": lambda: attend(q, k, v, None, 0.1), **sides}, seconds=0.5)  # noqa: B023
                ideal = times["dense"] * tile * KEYS / TOKENS**2
                share = ideal / times["free"]
                print(
                    f"{str(dtype)[6:]:9s} {dim:4d} {tile:5d}: {share:.3f} {tile * (1 / share - 1):6.1f} "
                    f"{times['masked'] / times['free']:.2f}"
                )


if __name__ == "__main__":
    main()
