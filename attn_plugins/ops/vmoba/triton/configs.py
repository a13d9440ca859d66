"""Tiles, warps and stages of the kernels of the exact form, as data: by target, precision and head size.

The rows were chosen by compiling them (docs/gpu.md has the rule): no register spilled, no tensor-core instruction lost,
the largest of a few tiles that does so. None was measured on a GPU.
"""

from __future__ import annotations

import torch

from attn_plugins.ops.block_sparse.triton.configs import Config, Row, by_width, row_key

SLAB = 1024  # queries of a program: so many, that those which visit a block fill its tiles

_FLOAT32 = {
    "forward": by_width((32, 32, 8, 2), (16, 16, 8, 1), (16, 16, 8, 1)),
    "grad_q": by_width((32, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    "grad_kv": by_width((16, 32, 4, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
}
# (kind of target, bits of an element) -> kernel -> configs (block_m, block_n, warps, stages) by width.
TABLE: dict[tuple[str, int], dict[str, Row]] = {
    ("sm_80", 16): {
        "forward": by_width((128, 32, 8, 2), (64, 64, 8, 2), (64, 32, 8, 1)),
        "grad_q": by_width((128, 32, 8, 2), (64, 64, 8, 2), (64, 32, 8, 1)),
        "grad_kv": by_width((32, 128, 8, 2), (32, 64, 8, 2), (32, 32, 8, 1)),
    },
    ("small", 16): {
        "forward": by_width((128, 32, 8, 1), (64, 64, 8, 2), (64, 32, 8, 1)),
        "grad_q": by_width((128, 32, 8, 2), (64, 64, 8, 2), (64, 32, 8, 1)),
        "grad_kv": by_width((32, 128, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1)),
    },
    ("sm_90", 16): {
        "forward": by_width((128, 64, 8, 3), (128, 64, 8, 3), (32, 32, 8, 1)),
        "grad_q": by_width((128, 64, 8, 2), (128, 64, 8, 2), (32, 32, 8, 1)),
        "grad_kv": by_width((64, 64, 4, 2), (32, 64, 8, 2), (32, 32, 8, 1)),
    },
    ("sm_100", 16): {
        "forward": by_width((128, 64, 8, 3), (64, 64, 8, 2), (64, 32, 8, 1)),
        "grad_q": by_width((128, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1)),
        "grad_kv": by_width((64, 64, 8, 2), (64, 64, 8, 1), (32, 32, 8, 1)),
    },
    ("gfx942", 16): {
        "forward": by_width((128, 64, 4, 3), (128, 32, 8, 2), (32, 32, 8, 1)),
        "grad_q": by_width((128, 64, 8, 2), (64, 32, 8, 2), (32, 32, 4, 1)),
        "grad_kv": by_width((64, 64, 4, 2), (32, 64, 4, 1), (16, 32, 8, 1)),
    },
    ("gfx950", 16): {
        "forward": by_width((128, 64, 4, 3), (64, 32, 8, 2), (64, 32, 8, 1)),
        "grad_q": by_width((128, 64, 8, 2), (64, 32, 8, 2), (32, 32, 4, 1)),
        "grad_kv": by_width((64, 64, 4, 2), (32, 64, 4, 1), (16, 32, 8, 1)),
    },
    **{(kind, 32): _FLOAT32 for kind in ("sm_80", "small", "sm_90", "sm_100", "gfx942", "gfx950")},
    **{("interpreter", bits): dict.fromkeys(_FLOAT32, by_width(*[(32, 32, 4, 1)] * 3)) for bits in (16, 32)},
}


def choose(kernel: str, target: str, dtype: torch.dtype, head_dim: int) -> Config:
    """The config of a kernel ("forward", "grad_q", "grad_kv") on a target ("sm_90", "gfx942", ...)."""
    _, kind, bits, column = row_key(kernel, target, dtype, head_dim)
    return TABLE[kind, bits][kernel][column]


def slab(target: str) -> int:
    return 64 if target == "interpreter" else SLAB
