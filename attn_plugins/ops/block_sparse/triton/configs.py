"""Tiles, warps and stages of each kernel, as data: by target, precision and head size.

The rows were chosen by compiling them (docs/gpu.md has the rule): no register spilled with any kind of plan, and no two
warps with the same product: eight on 64 rows repeat each other in some kernels. Which of those is fastest only a GPU
can tell: `autotune` measures, and `override` puts another config in a row's place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Config:
    """`block_m` queries by `block_n` keys a step; warps of a program; stages of its pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int


KERNELS = ("forward", "grad_q", "grad_kv")
WIDTHS = (64, 128, 256)  # a head size takes the row of the next larger one

# Targets that share a table: what sets them apart is their instructions and their shared memory.
KINDS = {
    "sm_80": "sm_80", "sm_87": "sm_80", "sm_90": "sm_90", "sm_100": "sm_100", "sm_103": "sm_100",
    "gfx950": "gfx950", "interpreter": "interpreter",
}  # fmt: skip
OTHER_CUDA, OTHER_HIP = "small", "gfx942"  # 100 KiB of shared memory (sm_86, sm_89, sm_120); 64 KiB

Row = tuple[Config, Config, Config]  # by width


def by_width(*configs: tuple[int, int, int, int]) -> Row:
    """A row of a table, from (block_m, block_n, warps, stages) for each of WIDTHS."""
    return tuple(Config(*config) for config in configs)  # type: ignore[return-value]


_TINY = {name: by_width(*[(32, 32, 4, 1)] * 3) for name in KERNELS}
_FLOAT32 = {
    "forward": by_width((64, 32, 8, 2), (32, 32, 8, 2), (16, 16, 4, 1)),
    "grad_q": by_width((32, 16, 8, 1), (32, 16, 8, 1), (16, 16, 4, 1)),
    "grad_kv": by_width((16, 32, 4, 1), (16, 32, 8, 1), (16, 16, 4, 1)),
}
# (kind, bits of an element) -> kernel -> configs (block_m, block_n, warps, stages) by width.
TABLE: dict[tuple[str, int], dict[str, Row]] = {
    ("sm_80", 16): {
        "forward": by_width((128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
        "grad_q": by_width((128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 1)),
        "grad_kv": by_width((32, 128, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1)),
    },
    ("small", 16): {
        "forward": by_width((128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 1)),
        "grad_q": by_width((128, 64, 8, 2), (64, 64, 8, 2), (32, 32, 4, 1)),
        "grad_kv": by_width((32, 128, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1)),
    },
    ("sm_90", 16): {
        "forward": by_width((128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
        "grad_q": by_width((128, 64, 8, 2), (128, 64, 8, 2), (32, 32, 4, 1)),
        "grad_kv": by_width((64, 64, 4, 2), (32, 128, 8, 2), (32, 32, 8, 1)),
    },
    ("sm_100", 16): {
        "forward": by_width((128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
        "grad_q": by_width((128, 64, 8, 2), (128, 64, 8, 3), (64, 32, 4, 1)),
        "grad_kv": by_width((64, 64, 8, 2), (32, 64, 8, 2), (32, 32, 8, 1)),
    },
    ("gfx942", 16): {
        "forward": by_width((128, 64, 4, 2), (128, 32, 8, 2), (64, 32, 8, 1)),
        "grad_q": by_width((128, 32, 4, 1), (128, 32, 4, 1), (32, 32, 4, 1)),
        "grad_kv": by_width((32, 128, 4, 1), (32, 64, 4, 1), (16, 32, 4, 1)),
    },
    ("gfx950", 16): {
        "forward": by_width((128, 64, 4, 2), (128, 32, 8, 2), (64, 32, 8, 1)),
        "grad_q": by_width((128, 32, 4, 1), (128, 32, 4, 1), (32, 32, 4, 1)),
        "grad_kv": by_width((32, 128, 4, 1), (32, 64, 4, 1), (16, 32, 4, 1)),
    },
    **{(kind, 32): _FLOAT32 for kind in ("small", "sm_90", "sm_100", "gfx942", "gfx950")},
    ("sm_80", 32): {**_FLOAT32, "grad_kv": by_width((16, 32, 8, 2), (32, 32, 8, 1), (16, 16, 4, 1))},
    **{("interpreter", bits): _TINY for bits in (16, 32)},
}

_overrides: dict[tuple[str, str, int, int], Config] = {}


def choose(kernel: str, target: str, dtype: torch.dtype, head_dim: int) -> Config:
    """The config of a kernel ("forward", "grad_q", "grad_kv") on a target ("sm_90", "gfx942", ...)."""
    key = row_key(kernel, target, dtype, head_dim)
    kind, bits, column = key[1:]
    return _overrides.get(key) or TABLE[kind, bits][kernel][column]


def set_override(kernel: str, target: str, dtype: torch.dtype, head_dim: int, config: Config | None) -> None:
    """Put a config in a row's place; None takes it back."""
    key = row_key(kernel, target, dtype, head_dim)
    if config is None:
        _overrides.pop(key, None)
    else:
        _overrides[key] = config


@contextlib.contextmanager
def override(target: str, dtype: torch.dtype, head_dim: int, **kernels: Config) -> Iterator[None]:
    """Inside, `forward=`, `grad_q=` or `grad_kv=` stand in their rows' places."""
    saved = dict(_overrides)
    for kernel, config in kernels.items():
        set_override(kernel, target, dtype, head_dim, config)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(saved)


def candidates(kernel: str, dtype: torch.dtype, head_dim: int) -> list[Config]:
    """What is worth trying for a kernel: the rows of all targets, with more and fewer warps and stages."""
    column = row_key(kernel, "", dtype, head_dim)[3]
    bits = 16 if dtype.itemsize == 2 else 32
    rows = {table[kernel][column] for (kind, size), table in TABLE.items() if size == bits and kind != "interpreter"}
    tiles = {(row.block_m, row.block_n) for row in rows}
    return [Config(m, n, w, s) for m, n in sorted(tiles) for w in (4, 8) for s in (1, 2, 3)]


def fitted(config: Config, q_size: int | None, kv_size: int | None) -> Config:
    """A config whose steps are no longer than the plan's blocks: the rest of a step would be idle."""
    steps = [
        step if size is None else min(step, max(16, 1 << (size - 1).bit_length()))
        for step, size in ((config.block_m, q_size), (config.block_n, kv_size))
    ]
    return replace(config, block_m=steps[0], block_n=steps[1])


def row_key(kernel: str, target: str, dtype: torch.dtype, head_dim: int) -> tuple[str, str, int, int]:
    """The kernel, the kind of target, bits of an element, and the column of a row."""
    kind = KINDS.get(target) or (OTHER_HIP if target.startswith("gfx") else OTHER_CUDA)
    column = next((i for i, width in enumerate(WIDTHS) if head_dim <= width), len(WIDTHS) - 1)
    return kernel, kind, 16 if dtype.itemsize == 2 else 32, column
