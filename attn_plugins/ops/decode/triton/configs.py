"""Tiles of the decode kernels as data, and how a cache is shared out.

With these tiles no target spills registers (tests/triton/codegen.csv); none was measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

SPLIT_KEYS = 512  # keys a program, if all heads keep equally many
MOST_SPLITS = 128


@dataclass(frozen=True)
class Config:
    """Keys in a tile, warps of a program, stages of its loads, and the most query rows of a program."""

    keys: int
    warps: int
    stages: int
    rows: int


# (maker, bytes of an element, widest head) -> config. Above `rows` the keys are read again.
TABLE = {
    ("cuda", 2, 64): Config(64, 4, 3, 32),
    ("cuda", 2, 128): Config(64, 8, 3, 32),
    ("cuda", 2, 256): Config(32, 8, 3, 16),
    ("cuda", 4, 64): Config(32, 8, 3, 16),
    ("cuda", 4, 128): Config(16, 4, 1, 16),
    ("cuda", 4, 256): Config(16, 8, 3, 16),
    ("hip", 2, 64): Config(64, 4, 2, 32),
    ("hip", 2, 128): Config(32, 4, 2, 32),
    ("hip", 2, 256): Config(32, 4, 2, 16),
    ("hip", 4, 64): Config(32, 4, 2, 16),
    ("hip", 4, 128): Config(16, 4, 2, 16),
    ("hip", 4, 256): Config(16, 4, 1, 16),
}


def config_for(target: str, itemsize: int, width: int) -> Config:
    """For a target, the bytes of an element and the head size rounded up to a power of two, at most 256."""
    maker = "hip" if target.startswith("gfx") else "cuda"
    return TABLE[maker, itemsize, max(width, 64)]


def split_count(total: int, kv_heads: int) -> int:
    """Programs that share a KV head's keys. From shapes that the host knows: lengths of ranges are on the device.

    Twice what heads of equal lengths would need, so that a head that keeps more than the others is cut as finely.
    """
    return max(1, min(MOST_SPLITS, -(-2 * total // (kv_heads * SPLIT_KEYS))))


def rows_for(rows: int, config: Config) -> int:
    """Query rows of a program: a power of two that a matrix instruction takes."""
    return min(config.rows, max(16, 1 << (rows - 1).bit_length()))
