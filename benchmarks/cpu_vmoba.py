"""`vmoba_attention` against dense SDPA on this CPU, as CSV rows.

    python benchmarks/cpu_vmoba.py [--quick] [--out benchmarks/results/cpu_vmoba.csv]

Both sides run interleaved; the ratio is of medians. `attention` has its blocks chosen beforehand, `whole` chooses them.
A wrong result is not timed: each problem is first compared with dense attention under its own mask, on some rows.
Columns: `density` is of the keys really visited; `of_attention` and `of_whole` are the shares of 1 / density that the
two speed-ups reach.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attn_plugins.ops import vmoba_attention  # noqa: E402
from attn_plugins.ops.vmoba.choice import choose_for_tiles, choose_for_tokens  # noqa: E402
from attn_plugins.ops.vmoba.layout import Layout, decode, encode, fit_block, fit_tile  # noqa: E402
from attn_plugins.ops.vmoba.lists import attend_lists  # noqa: E402
from attn_plugins.ops.vmoba.rows_op import attend_rows  # noqa: E402
from attn_plugins.ops.vmoba.selection import Selection  # noqa: E402
from attn_plugins.sequence import Sequence  # noqa: E402
from benchmarks.rows import write_rows  # noqa: E402
from benchmarks.stopwatch import interleaved  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """A grid, its blocks, how many a query keeps, and (for the pooled form) tokens of a tile."""

    grid: tuple[int, ...]
    block: tuple[int, ...]
    k_blocks: int
    tile: int | None = None
    heads: int = 4

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)


QUICK = (
    Problem((8, 32, 32), (1, -1, -1), 2),
    Problem((8, 32, 32), (-1, 16, 8), 1),
    Problem((8, 32, 32), (4, 16, 8), 4),
    Problem((8, 32, 32), (4, 16, 8), 2),
    Problem((8, 32, 32), (4, 8, 8), 8),
    Problem((8, 32, 32), (4, 8, 8), 4),
)
PROBLEMS = (
    *QUICK,
    Problem((16, 32, 32), (2, -1, -1), 2),
    Problem((16, 32, 32), (-1, 8, 8), 4),
    Problem((16, 32, 32), (8, 8, 16), 4),
    Problem((16, 32, 32), (8, 8, 16), 4, tile=128),
    Problem((21, 30, 52), (3, -1, -1), 2, heads=1),  # Wan 2.1 1.3B at 480p, as published
    Problem((21, 30, 52), (-1, 5, 13), 6, heads=1),
    Problem((21, 30, 52), (7, 5, 13), 18, heads=1),
)


def measure(problem: Problem, exact: bool, dtype: str, dim: int, backward: bool) -> dict[str, object]:
    """One row."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, problem.heads, problem.tokens, dim)
    qkv = [torch.randn(shape, generator=generator).to(DTYPES[dtype]).requires_grad_(backward) for _ in range(3)]
    sizes = fit_block(problem.grid, problem.block)
    tile = fit_tile(sizes, problem.tile)
    spec, how, scale = encode(Sequence(problem.grid), sizes, tile), Selection(k_blocks=problem.k_blocks), dim**-0.5
    choose = choose_for_tokens if exact else choose_for_tiles
    choice = choose(qkv[0], qkv[1], spec, how, scale)
    rows = choice if isinstance(choice, torch.Tensor) else _by_token(decode(spec)[0][1], *choice)
    options = {"grid": problem.grid, "block": problem.block, "k_blocks": problem.k_blocks, "tile": problem.tile}

    def attention() -> torch.Tensor:
        if isinstance(choice, torch.Tensor):
            return attend_rows(*qkv, choice, scale, spec)[0]
        return attend_lists(*qkv, *choice, scale, spec, "cpu")[0]

    def whole() -> torch.Tensor:
        return vmoba_attention(*qkv, exact=exact, **options)  # type: ignore[arg-type, return-value]

    one = decode(spec)[0][1]
    check(qkv, rows, one, whole())
    density = float((rows * torch.from_numpy(one.blocks.sizes)).sum(-1, dtype=torch.float64).mean()) / problem.tokens
    sides: dict[str, Callable[[], object]] = {
        "dense": lambda: F.scaled_dot_product_attention(*qkv), "attention": attention, "whole": whole,
    }  # fmt: skip
    if backward:
        sides = {name: _with_backward(run, qkv) for name, run in sides.items()}
    times = interleaved(sides, seconds=2.0, least=3)
    ratios = {name: times["dense"] / times[name] for name in ("attention", "whole")}
    return {
        "form": "exact" if exact else "pooled", "grid": _text(problem.grid), "tokens": problem.tokens,
        "block": _text(sizes), "tile": "1" if exact else _text(tile), "k_blocks": problem.k_blocks, "dtype": dtype,
        "head_dim": dim, "heads": problem.heads, "direction": "fwd+bwd" if backward else "fwd",
        "density": round(density, 4), "dense_ms": round(times["dense"], 2),
        "attention_ms": round(times["attention"], 2), "whole_ms": round(times["whole"], 2),
        "speedup": round(ratios["whole"], 2),
        "of_attention": round(ratios["attention"] * density, 3), "of_whole": round(ratios["whole"] * density, 3),
    }  # fmt: skip


def check(qkv: Tensors, selected: torch.Tensor, one: Layout, out: torch.Tensor) -> None:
    """Compare 64 rows of the last head with dense attention under the mask, in float64."""
    rows = torch.linspace(0, qkv[0].shape[2] - 1, 64).long()
    block_of = one.own[one.tile_of]
    mask = selected[0, -1, rows][:, block_of]
    wide = [t[0, -1].detach().double() for t in qkv]
    want = F.scaled_dot_product_attention(wide[0][rows][None], wide[1][None], wide[2][None], attn_mask=mask[None])[0]
    error = (out[0, -1, rows].detach().double() - want).abs().max().item()
    limit = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[out.dtype]
    if not error <= limit:
        raise SystemExit(f"{one.block}: error {error:.2e} above {limit:.0e}; a wrong result is not timed")


def _by_token(one: Layout, lists: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """(B, H, tokens, blocks) bool from the lists of tiles."""
    first = torch.arange(lists.shape[-1]) < count[..., None]
    tiles = torch.zeros(*lists.shape[:3], one.count, dtype=torch.bool).scatter_(-1, lists.long(), first)
    return tiles[:, :, one.tile_of]


def _with_backward(run: Callable[[], object], inputs: Tensors) -> Callable[[], object]:
    return lambda: torch.autograd.grad(run().sum(), inputs)  # type: ignore[attr-defined]


def _text(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8,192 tokens only")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu_vmoba.csv"))
    parser.add_argument("--dtypes", nargs="*", default=["fp32"])
    parser.add_argument("--dims", nargs="*", type=int, default=[64])
    parser.add_argument("--forms", nargs="*", default=["pooled", "exact"])
    parser.add_argument("--directions", nargs="*", default=["fwd", "fwd+bwd"])
    arguments = parser.parse_args()
    plan = [
        (problem, form == "exact", dtype, dim, direction == "fwd+bwd")
        for dtype in arguments.dtypes
        for dim in arguments.dims
        for form in arguments.forms
        for direction in arguments.directions
        for problem in (QUICK if arguments.quick else PROBLEMS)
        if form == "pooled" or problem.tile is None
    ]
    write_rows(plan, lambda case: measure(*case), arguments.out)


if __name__ == "__main__":
    main()
