"""Tiles of the agent kernels as data, and how long axes are shared out among programs.

The rows were chosen by compiling them, with biases and without (docs/gpu.md has the rule). In tests/triton/codegen.csv
are half precision at 40, 64, 80 and 128 and float32 at 64 and 128, with biases of 49 agents and 197 tokens as well: no
kernel spills on any of its targets. Nor do, in half precision and compiled besides, 72 and 96 on all targets and 256 on
sm_80, sm_90, sm_100 and sm_120.

What spills: float32 at 256, `grad_rows` on sm_80, 142 instructions (163 with a bias): each product holds 256 numbers of
a row at once, and fewer warps or longer tiles spill more. Not compiled: float32 at 256 on other targets, or in kernels
but `attend` and `grad_rows`; half precision at 256 on AMD, but for these two on gfx942. Nothing was measured on a GPU.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from attn_plugins.ops.block_sparse.triton.configs import WIDTHS, Config, Row, by_width, fitted, row_key

PROGRAMS = 256  # wanted of a launch: a large GPU has half as many processors
HELD = 2048  # numbers of a tile that every warp can hold
LEAST_WARPS = 4  # of a program, which so loads its tiles in fewer steps
LEAST_TILES = 4  # of a share: a program that does less is not worth the putting together

_WARP = {  # products by single warps, from registers
    "attend": by_width((128, 64, 8, 3), (128, 32, 8, 2), (64, 32, 8, 1)),
    "grad_rows": by_width((128, 32, 8, 2), (128, 16, 8, 2), (16, 16, 4, 1)),
    "grad_keys": by_width((16, 128, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1)),
    "grad_bias": by_width((64, 64, 8, 2), (64, 32, 8, 2), (32, 16, 4, 1)),
}
_HOPPER = {
    "attend": by_width((128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 8, 1)),
    "grad_rows": by_width((128, 32, 8, 2), (128, 32, 8, 2), (16, 16, 4, 1)),
    "grad_keys": by_width((32, 128, 8, 2), (32, 64, 8, 2), (32, 32, 8, 1)),
    "grad_bias": by_width((64, 64, 8, 2), (64, 32, 8, 2), (32, 16, 4, 1)),
}
_FLOAT32 = {
    "attend": by_width((64, 32, 8, 1), (32, 32, 8, 1), (16, 16, 8, 1)),
    "grad_rows": by_width((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    "grad_keys": by_width((16, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
    "grad_bias": by_width((32, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
}
_AMD = {
    "attend": by_width((128, 64, 4, 1), (128, 32, 4, 1), (32, 32, 4, 1)),
    "grad_rows": by_width((128, 32, 4, 1), (128, 32, 4, 1), (32, 32, 4, 1)),
    "grad_keys": by_width((32, 128, 4, 1), (32, 64, 4, 1), (16, 32, 4, 1)),
    "grad_bias": by_width((64, 64, 4, 1), (64, 64, 4, 1), (32, 32, 4, 1)),
}
_AMD_FLOAT32 = {
    "attend": by_width((64, 32, 4, 1), (64, 32, 4, 1), (16, 16, 4, 1)),
    "grad_rows": by_width((64, 16, 4, 1), (64, 16, 4, 1), (16, 16, 4, 1)),
    "grad_keys": by_width((16, 64, 4, 1), (16, 64, 4, 1), (16, 16, 4, 1)),
    "grad_bias": by_width((64, 32, 4, 1), (64, 32, 4, 1), (16, 16, 4, 1)),
}
# (kind of target, bits of an element) -> kernel -> configs (block_m, block_n, warps, stages) by width.
TABLE: dict[tuple[str, int], dict[str, Row]] = {
    ("sm_80", 16): _WARP,
    ("small", 16): {**_WARP, "grad_keys": by_width((16, 128, 8, 2), (64, 64, 8, 1), (32, 32, 8, 1))},
    ("sm_90", 16): _HOPPER,
    ("sm_100", 16): {**_HOPPER, "grad_rows": by_width((128, 32, 8, 2), (128, 64, 8, 2), (64, 32, 8, 1))},
    **{(kind, 32): _FLOAT32 for kind in ("sm_80", "small", "sm_90", "sm_100")},
    **{(kind, 16): _AMD for kind in ("gfx942", "gfx950")},
    **{(kind, 32): _AMD_FLOAT32 for kind in ("gfx942", "gfx950")},
    **{("interpreter", bits): dict.fromkeys(_FLOAT32, by_width(*[(32, 32, 4, 1)] * 3)) for bits in (16, 32)},
}
# Head sizes that fill a part of their tile are read behind a mask, which takes registers: what the row would spill.
PADDED: dict[tuple[str, str, int, int], Config] = {
    ("attend", "small", 16, 1): Config(128, 32, 8, 1),
}


def choose(kernel: str, target: str, dtype: torch.dtype, head_dim: int) -> Config:
    """The config of a kernel ("attend", "grad_rows", "grad_keys", "grad_bias") on a target ("sm_90", "gfx942", ...)."""
    key = row_key(kernel, target, dtype, head_dim)
    _, kind, bits, column = key
    row = TABLE[kind, bits][kernel][column]
    return row if head_dim in WIDTHS else PADDED.get(key, row)


def fit(kernel: str, config: Config, queries: int, keys: int, width: int) -> Config:
    """Tiles no longer than what they go over, and half the warps for half the rows: more would compute them twice.

    Rows fewer than the tile is wide are given to all warps alike, each of which then holds them all. 32 of them it can
    at a width of 64, and 16 at 128; where there are more, the whole tile is kept, with nothing in a part of it.
    """
    found = fitted(config, queries, keys)
    if found.block_m < config.block_m and found.block_m < width and found.block_m * width > HELD:
        found = replace(found, block_m=config.block_m)
    own, was = (found.block_n, config.block_n) if kernel == "grad_keys" else (found.block_m, config.block_m)
    return replace(found, warps=max(min(config.warps, LEAST_WARPS), config.warps * own // was))


def split_count(programs: int, length: int, block: int) -> int:
    """Shares of a length that make enough of `programs` programs; from shapes alone, so that no call differs."""
    tiles = -(-length // block)
    return max(1, min(-(-PROGRAMS // programs), tiles // LEAST_TILES))
