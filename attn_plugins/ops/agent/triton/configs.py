"""Tiles of the agent kernels as data, and how long axes are shared out among programs.

Half precision with head sizes up to 64 and up to 128 was compiled for some targets (sm_80 spills at 128); float32 and
256 are first guesses, and float32 spills. None was measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

PROGRAMS = 256  # wanted of a launch: a large GPU has half as many processors
LEAST_TILES = 4  # of a share: a program that does less is not worth the putting together


@dataclass(frozen=True)
class Config:
    """`block_m` query rows by `block_n` keys a step, warps of a program, stages of its loads."""

    block_m: int
    block_n: int
    warps: int
    stages: int


KERNELS = ("attend", "grad_rows", "grad_keys", "grad_bias")
_HALF = {
    64: (Config(128, 64, 8, 3), Config(64, 32, 4, 2), Config(32, 64, 8, 2), Config(64, 32, 8, 2)),
    128: (Config(64, 64, 8, 2), Config(64, 32, 8, 2), Config(32, 64, 8, 2), Config(64, 32, 8, 2)),
    256: (Config(64, 32, 8, 1), Config(32, 32, 4, 1), Config(32, 32, 8, 1), Config(32, 32, 4, 1)),
}
_FLOAT32 = {
    64: (Config(64, 32, 8, 2), Config(32, 16, 8, 1), Config(16, 32, 8, 1), Config(32, 32, 8, 1)),
    128: (Config(32, 32, 8, 2), Config(32, 16, 8, 1), Config(16, 32, 8, 1), Config(32, 16, 8, 1)),
    256: (Config(16, 16, 4, 1), Config(16, 16, 4, 1), Config(16, 16, 4, 1), Config(16, 16, 4, 1)),
}
# (maker, bytes of an element) -> widest head -> a config for each of KERNELS.
TABLE = {
    ("cuda", 2): _HALF,
    ("cuda", 4): _FLOAT32,
    ("hip", 2): {
        64: (Config(128, 64, 4, 1), Config(64, 64, 4, 1), Config(32, 64, 4, 1), Config(64, 64, 4, 1)),
        128: (Config(64, 32, 4, 1), Config(64, 32, 4, 1), Config(32, 64, 4, 1), Config(32, 32, 4, 1)),
        256: (Config(32, 32, 4, 1), Config(32, 32, 4, 1), Config(16, 32, 4, 1), Config(32, 32, 4, 1)),
    },
    ("hip", 4): _FLOAT32,
}
_TINY = Config(32, 32, 4, 1)


def config_for(kernel: str, target: str, dtype: torch.dtype, head_dim: int) -> Config:
    """Of one of KERNELS on a target ("sm_90", "gfx942", "interpreter"); head sizes up to 256."""
    if target == "interpreter":
        return _TINY
    maker = "hip" if target.startswith("gfx") else "cuda"
    width = next(width for width in (64, 128, 256) if head_dim <= width)
    return TABLE[maker, dtype.itemsize][width][KERNELS.index(kernel)]


def split_count(programs: int, length: int, block: int) -> int:
    """Shares of a length that make enough of `programs` programs; from shapes alone, so that no call differs."""
    tiles = -(-length // block)
    return max(1, min(-(-PROGRAMS // programs), tiles // LEAST_TILES))
