"""Tiles of the merge kernels as data. With these no target spills registers (tests/triton/codegen.csv).

None was measured on a GPU. All tiles are short in one direction (rows of a phrase, tokens of an image), so positions
are what a program has many of.
"""

from __future__ import annotations

from dataclasses import dataclass

SHARE = 512  # positions that a program walks over to find a phrase's spread, if there are more
LEAST_ROWS = 16  # that a matrix instruction takes


@dataclass(frozen=True)
class Config:
    """Positions of a tile, warps of a program, stages of its loads, and the most rows of the other side."""

    positions: int
    warps: int
    stages: int
    rows: int


# (maker, bytes of an element, widest head) -> config
TABLE = {
    ("cuda", 2, 64): Config(128, 8, 2, 64),
    ("cuda", 2, 128): Config(64, 8, 2, 32),
    ("cuda", 2, 256): Config(32, 8, 1, 16),
    ("cuda", 4, 64): Config(64, 8, 1, 32),
    ("cuda", 4, 128): Config(32, 8, 2, 16),
    ("cuda", 4, 256): Config(16, 16, 3, 16),
    ("hip", 2, 64): Config(128, 8, 1, 64),
    ("hip", 2, 128): Config(64, 4, 1, 32),
    ("hip", 2, 256): Config(32, 8, 1, 16),
    ("hip", 4, 64): Config(64, 8, 1, 32),
    ("hip", 4, 128): Config(32, 8, 1, 16),
    ("hip", 4, 256): Config(16, 4, 1, 16),
}


def config_for(target: str, itemsize: int, width: int) -> Config:
    """For a target, the bytes of an element and the head size rounded up to a power of two, at most 256."""
    maker = "hip" if target.startswith("gfx") else "cuda"
    return TABLE[maker, itemsize, max(width, 64)]


def rows_for(rows: int, config: Config) -> int:
    """Rows of the short side in a tile, for so many in all."""
    return min(config.rows, max(LEAST_ROWS, 1 << (rows - 1).bit_length()))
