"""Tiles of the agent kernels as data, and how long axes are shared out among programs.

The rows were chosen by compiling them, with biases and without (docs/gpu.md has the rule). Half precision at 64 and 128
and float32 at 64 are in tests/triton/codegen.csv, and do not spill. What is not in it, and spills:

- float32 at 128 on NVIDIA: `attend` (64 instructions on sm_80) and `grad_rows` (260);
- half precision at 80 on sm_120: `attend` and `grad_rows` (up to 9), `grad_keys` with a bias (4);
- half precision at 128 on sm_80 with a bias of rows that 16 does not divide, which is read by single numbers: `attend`
  (42) and `grad_rows` (16);
- half precision at 256: `attend` on sm_80 (192), `grad_rows` on sm_80 (398) and sm_90 (130), `grad_bias` on sm_80,
  sm_90 and sm_100 (up to 33).

Head sizes 40, 72 and 96 were not compiled, nor float32 at 256. Nothing was measured on a GPU.
"""

from __future__ import annotations

import torch

from attn_plugins.ops.block_sparse.triton.configs import Config, Row, by_width, row_key

PROGRAMS = 256  # wanted of a launch: a large GPU has half as many processors
LEAST_TILES = 4  # of a share: a program that does less is not worth the putting together

_WARP = {  # products by single warps, from registers
    "attend": by_width((128, 64, 8, 3), (128, 32, 8, 2), (64, 32, 8, 1)),
    "grad_rows": by_width((128, 32, 8, 2), (128, 16, 8, 2), (32, 32, 4, 1)),
    "grad_keys": by_width((16, 128, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1)),
    "grad_bias": by_width((64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 4, 1)),
}
_HOPPER = {
    "attend": by_width((128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 8, 1)),
    "grad_rows": by_width((128, 32, 8, 2), (128, 32, 8, 2), (64, 32, 8, 1)),
    "grad_keys": by_width((32, 128, 8, 2), (32, 64, 8, 2), (32, 32, 8, 1)),
    "grad_bias": by_width((64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 4, 1)),
}
_FLOAT32 = {
    "attend": by_width((32, 32, 8, 2), (16, 16, 8, 1), (16, 16, 8, 1)),
    "grad_rows": by_width((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    "grad_keys": by_width((16, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
    "grad_bias": by_width((32, 32, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1)),
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
    **{(kind, 16): _WARP for kind in ("sm_80", "small")},
    ("sm_90", 16): _HOPPER,
    ("sm_100", 16): {**_HOPPER, "grad_rows": by_width((128, 32, 8, 2), (128, 64, 8, 2), (64, 32, 8, 1))},
    **{(kind, 32): _FLOAT32 for kind in ("sm_80", "small", "sm_90", "sm_100")},
    **{(kind, 16): _AMD for kind in ("gfx942", "gfx950")},
    **{(kind, 32): _AMD_FLOAT32 for kind in ("gfx942", "gfx950")},
    **{("interpreter", bits): dict.fromkeys(_FLOAT32, by_width(*[(32, 32, 4, 1)] * 3)) for bits in (16, 32)},
}


def choose(kernel: str, target: str, dtype: torch.dtype, head_dim: int) -> Config:
    """The config of a kernel ("attend", "grad_rows", "grad_keys", "grad_bias") on a target ("sm_90", "gfx942", ...)."""
    _, kind, bits, column = row_key(kernel, target, dtype, head_dim)
    return TABLE[kind, bits][kernel][column]


def split_count(programs: int, length: int, block: int) -> int:
    """Shares of a length that make enough of `programs` programs; from shapes alone, so that no call differs."""
    tiles = -(-length // block)
    return max(1, min(-(-PROGRAMS // programs), tiles // LEAST_TILES))
