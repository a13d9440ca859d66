"""Tiles of the kernel as data: by target, precision and head size.

The rows were chosen by compiling them (docs/gpu.md has the rule): at the head sizes in tests/triton/codegen.csv no
target spills a register. Nothing was measured on a GPU.
"""

from __future__ import annotations

import torch

from attn_plugins.ops.block_sparse.triton.configs import Config, Row, by_width, fitted, row_key

_HALF = by_width((128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 8, 1))
_FLOAT32 = by_width((64, 32, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1))
# (kind of target, bits of an element) -> configs (rows, keys, warps, stages) by width.
TABLE: dict[tuple[str, int], Row] = {
    ("sm_80", 16): by_width((128, 64, 8, 3), (64, 32, 8, 2), (32, 32, 8, 1)),
    ("small", 16): by_width((64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 1)),
    ("sm_90", 16): _HALF,
    ("sm_100", 16): _HALF,
    **{(kind, 32): _FLOAT32 for kind in ("sm_80", "small", "sm_90", "sm_100")},
    **{(kind, 16): by_width((128, 64, 4, 1), (128, 32, 4, 1), (32, 32, 4, 1)) for kind in ("gfx942", "gfx950")},
    **{(kind, 32): by_width((64, 32, 4, 1), (64, 32, 4, 1), (16, 16, 4, 1)) for kind in ("gfx942", "gfx950")},
    **{("interpreter", bits): by_width(*[(32, 32, 4, 1)] * 3) for bits in (16, 32)},
}
# Without a diagonal the compiler orders the loops in another way, and the row would spill.
BIDIRECTIONAL: dict[tuple[str, int, int], Config] = {
    ("sm_90", 16, 1): Config(64, 64, 8, 2),
    ("small", 16, 1): Config(64, 16, 8, 2),
}


def choose(target: str, dtype: torch.dtype, head_dim: int, queries: int, keys: int, causal: bool) -> Config:
    """The config on a target ("sm_90", "gfx942", ...), its tiles no longer than what they go over."""
    _, kind, bits, column = row_key("attend", target, dtype, head_dim)
    config = TABLE[kind, bits][column]
    if not causal:
        config = BIDIRECTIONAL.get((kind, bits, column), config)
    return fitted(config, max(config.block_m // 2, min(queries, config.block_m)), keys)
