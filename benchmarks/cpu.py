"""`neighborhood_attention` against dense SDPA, compiled flex attention and NATTEN on this CPU, as CSV rows.

    python benchmarks/cpu.py [--quick] [--out benchmarks/results/cpu.csv]

Both sides run interleaved; the ratio is of medians; making the plan is outside (it is cached between calls), gathering
and writing back inside. A wrong result is not timed: each problem is first compared with dense attention and a mask.
Columns: `density` is of the keys really visited, `flop_density` of the window alone; `of_blocks` and `of_flops` are the
shares of those ideals that the speed-up reaches, `of_model` the share of what the cost model expects. -1: not measured,
because it has no backward on a CPU (flex, NATTEN), is not installed (NATTEN: pip install --no-build-isolation natten)
or did not run.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attn_plugins.ops import neighborhood_attention  # noqa: E402
from attn_plugins.ops.neighborhood.reference import neighborhood_mask  # noqa: E402
from attn_plugins.pipelines.benching import machine  # noqa: E402
from attn_plugins.plan.cost import choose_tiles  # noqa: E402
from attn_plugins.plan.windows import axis_windows  # noqa: E402
from attn_plugins.sequence import Sequence  # noqa: E402
from benchmarks.problems import PROBLEMS, QUICK, Problem  # noqa: E402
from benchmarks.stopwatch import interleaved  # noqa: E402

PEERS = ("flex", "natten")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure(problem: Problem, dtype: str, dim: int, backward: bool, heads: int, peers: bool) -> dict[str, object]:
    """One row: dense, ours and, forward only, `peers` (compiled flex attention, NATTEN)."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, heads, problem.tokens, dim)
    q, k, v = (torch.randn(shape, generator=generator).to(DTYPES[dtype]).requires_grad_(backward) for _ in range(3))

    def ours() -> torch.Tensor:
        return neighborhood_attention(q, k, v, grid=problem.grid, window=problem.window, stride=problem.stride)

    check(problem, q, k, v, ours())
    sides = {"dense": lambda: F.scaled_dot_product_attention(q, k, v), "ours": ours}
    if peers and not backward:
        sides |= peer_sides(problem, q, k, v)
    if backward:
        sides = {name: _with_backward(run, (q, k, v)) for name, run in sides.items()}
    times = interleaved(sides)
    axes = axis_windows(problem.grid, problem.window, problem.stride)
    tiles = choose_tiles(axes, itemsize=q.element_size())
    total = problem.tokens**2
    speedup = times["dense"] / times["ours"]
    return {
        "kind": problem.kind, "grid": _text(problem.grid), "tokens": problem.tokens, "window": _text(problem.window),
        "stride": _text(problem.stride), "tile": _text(tiles.q_tile), "dtype": dtype, "head_dim": dim, "heads": heads,
        "direction": "fwd+bwd" if backward else "fwd", "density": round(tiles.pairs / total, 4),
        "flop_density": round(problem.flop_density, 4), "dense_ms": round(times["dense"], 2),
        "ours_ms": round(times["ours"], 2), "speedup": round(speedup, 2),
        **{f"{name}_speedup": round(times["dense"] / times[name], 2) if name in times else -1 for name in PEERS},
        "of_blocks": round(speedup * tiles.pairs / total, 3), "of_flops": round(speedup * problem.flop_density, 3),
        "of_model": round(speedup * min(tiles.cost / total, 1.0), 3),
    }  # fmt: skip


def check(problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
    """Compare 64 rows of a head with dense attention under the mask, in float64."""
    rows = torch.linspace(0, problem.tokens - 1, 64).long()
    axes = axis_windows(problem.grid, problem.window, problem.stride)
    mask = _mask_rows(problem, axes, rows)
    wide = [t[0, -1].detach().double() for t in (q, k, v)]
    want = F.scaled_dot_product_attention(wide[0][rows][None], wide[1][None], wide[2][None], attn_mask=mask[None])[0]
    error = (out[0, -1, rows].detach().double() - want).abs().max().item()
    limit = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[q.dtype]
    if not error <= limit:
        raise SystemExit(f"{problem}: error {error:.2e} above {limit:.0e}; a wrong result is not timed")


def _mask_rows(problem: Problem, axes: tuple, rows: torch.Tensor) -> torch.Tensor:  # type: ignore[type-arg]
    """(rows, N): the mask of some rows as the product of the axes' masks (each small), never N x N."""
    mask = torch.ones(len(rows), 1, dtype=torch.bool)
    rest = problem.tokens
    for size, axis in zip(problem.grid, axes, strict=True):
        rest //= size
        one = neighborhood_mask(Sequence((size,)), (axis,)) if size <= 4096 else _long_axis(axis, rows)
        seen = one[rows // rest % size] if size <= 4096 else one
        mask = (mask[:, :, None] & seen[:, None]).flatten(1)
    return mask


def _long_axis(axis, rows: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
    start, end = (torch.from_numpy(t)[rows] for t in axis.intervals(axis.size))
    keys = torch.arange(axis.size)
    return (keys >= start[:, None]) & (keys < end[:, None])


def peer_sides(problem: Problem, *qkv: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """The peers that run this problem here."""
    sides = {}
    for name, make in (("flex", flex_side), ("natten", natten_side)):
        try:
            run = make(problem, *qkv)
            run()
        except Exception as error:  # whatever a peer cannot do on this machine is a -1, said once
            print(f"    {name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160])
        else:
            sides[name] = run
    return sides


def natten_side(problem: Problem, *qkv: torch.Tensor) -> Callable[[], torch.Tensor]:
    """NATTEN's own operator, (B, *grid, H, D); on a CPU it runs flex attention."""
    import natten

    if problem.tokens > 4096:
        raise ValueError("on a CPU it makes all N x N scores: seconds a call from here on")
    torch._dynamo.reset()
    tensors = [t.detach().transpose(1, 2).unflatten(1, problem.grid).contiguous() for t in qkv]
    run = getattr(natten, f"na{len(problem.grid)}d")
    return lambda: run(*tensors, kernel_size=problem.window, stride=problem.stride)


def flex_side(problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Compiled flex attention with the same mask in raster order (index building and compiling outside)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    tables = []
    for axis in axis_windows(problem.grid, problem.window, problem.stride):
        tables.append(tuple(torch.from_numpy(t) for t in axis.intervals(axis.size)))

    def mask_mod(b, h, i, j):  # type: ignore[no-untyped-def]
        seen, rest = True, problem.tokens
        for size, (start, end) in zip(problem.grid, tables, strict=True):
            rest //= size
            row, key = i // rest % size, j // rest % size
            seen = seen & (key >= start[row]) & (key < end[row])
        return seen

    block_mask = create_block_mask(mask_mod, None, None, problem.tokens, problem.tokens, device="cpu")
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=block_mask)


def _with_backward(run: Callable[[], torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> Callable[[], object]:
    def both() -> object:
        out = run()
        return torch.autograd.grad(out, inputs, out.detach())

    return both


def _text(values: tuple[int | tuple[int, ...], ...]) -> str:
    """16x16x16; tiles of different lengths along an axis as 16+1+15."""
    return "x".join("+".join(map(str, value)) if isinstance(value, tuple) else str(value) for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 8,192 tokens, head size 64")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu.csv"))
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES))
    parser.add_argument("--dims", nargs="*", type=int, default=None)
    parser.add_argument("--kinds", nargs="*", default=["aligned", "stride1", "dense"])
    parser.add_argument("--directions", nargs="*", default=["fwd", "fwd+bwd"])
    parser.add_argument("--tokens", nargs=2, type=int, default=[0, 1 << 30], help="least and most tokens")
    parser.add_argument("--no-peers", action="store_true")
    arguments = parser.parse_args()
    dims = arguments.dims or ([64] if arguments.quick else [64, 128])
    plan = [
        (problem, dtype, dim, direction == "fwd+bwd")
        for dtype in arguments.dtypes
        for dim in dims
        for direction in arguments.directions
        for problem in (QUICK if arguments.quick else PROBLEMS)
        if problem.kind in arguments.kinds and arguments.tokens[0] <= problem.tokens <= arguments.tokens[1]
    ]
    about = machine.describe()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = None
        for number, (problem, dtype, dim, backward) in enumerate(plan, 1):
            peers = not arguments.no_peers and dim == 64 and problem.tokens <= 8192
            row = {**measure(problem, dtype, dim, backward, arguments.heads, peers), **about}
            if writer is None:
                writer = csv.DictWriter(file, list(row), lineterminator="\n")
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            shown = " ".join(str(row[name]) for name in list(row)[:10])
            print(f"[{number}/{len(plan)}] {shown} |", *(f"{name} {row[name]}" for name in list(row)[10 : -len(about)]))


if __name__ == "__main__":
    main()
