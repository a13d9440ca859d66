"""`span_attention` against causal SDPA on this CPU, as CSV rows.

    python benchmarks/cpu_spans.py [--quick] [--out benchmarks/results/cpu_spans.csv]
    python benchmarks/cpu_spans.py --forms      # every form and chunk, beside what the cost model expects of it

Both sides run interleaved; the ratio is of medians. A wrong result is not timed: each problem is first compared with
masked attention in float64. Columns: `spans` of the heads (one, or a mixed layer's), `pair_share` of causal attention's
(query, key) pairs, `bound` the speed-up if only pairs counted, `of_flops` the share of it that is reached.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attn_plugins.ops import span_attention  # noqa: E402
from attn_plugins.ops.spans import cpu  # noqa: E402
from attn_plugins.ops.spans.cost import CHUNKS, band_cost, choose_bands  # noqa: E402
from attn_plugins.ops.spans.parts import Band, corners, edges, history, tiles  # noqa: E402
from attn_plugins.plan.spans import SpanRule  # noqa: E402
from benchmarks.rows import write_rows  # noqa: E402
from benchmarks.stopwatch import interleaved  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEADS = 4


@dataclass(frozen=True)
class Problem:
    """`shares`: the span of each head (of all, if one) as a share of the tokens."""

    tokens: int
    shares: tuple[float, ...]
    kv_heads: int = HEADS
    sink: int = 0

    @property
    def spans(self) -> list[int]:
        shares = self.shares * (HEADS // len(self.shares))
        return [int(share * self.tokens) for share in shares]

    @property
    def pair_share(self) -> float:
        n = self.tokens
        seen = [min(span + self.sink, n) for span in self.spans]
        return sum(2 * span * n - span * (span - 1) for span in seen) / (len(seen) * n * (n + 1))

    def draw(self, dtype: torch.dtype, dim: int, backward: bool) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = ((1, heads, self.tokens, dim) for heads in (HEADS, self.kv_heads, self.kv_heads))
        return [torch.randn(shape, generator=generator).to(dtype).requires_grad_(backward) for shape in shapes]


PROBLEMS = tuple(
    Problem(tokens, shares, kv_heads, sink)
    for tokens in (4096, 8192, 16384)
    for shares, kv_heads, sink in (
        ((1 / 8,), HEADS, 0),
        ((1 / 8,), HEADS, 64),
        ((1 / 8,), 1, 0),
        ((1 / 4,), HEADS, 0),
        ((1 / 2,), HEADS, 0),
        ((3 / 4,), HEADS, 0),
        ((1 / 8, 1 / 4, 1 / 2, 1.0), HEADS, 64),
    )
)


def measure(problem: Problem, dtype: str, dim: int, backward: bool) -> dict[str, object]:
    q, k, v = problem.draw(DTYPES[dtype], dim, backward)
    grouped = problem.kv_heads != HEADS

    def ours() -> torch.Tensor:
        return span_attention(q, k, v, spans=problem.spans, sink=problem.sink)  # type: ignore[return-value]

    check(problem, q, k, v, ours())
    sides = {"dense": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped), "ours": ours}
    if backward:
        sides = {name: _with_backward(run, (q, k, v)) for name, run in sides.items()}
    times = interleaved(sides)
    speedup, bound = times["dense"] / times["ours"], 1 / problem.pair_share
    return {
        "tokens": problem.tokens, "spans": "+".join(map(str, dict.fromkeys(problem.spans))), "sink": problem.sink,
        "dtype": dtype, "head_dim": dim, "heads": HEADS, "kv_heads": problem.kv_heads,
        "direction": "fwd+bwd" if backward else "fwd", "pair_share": round(problem.pair_share, 4),
        "dense_ms": round(times["dense"], 2), "ours_ms": round(times["ours"], 2), "speedup": round(speedup, 2),
        "bound": round(bound, 2), "of_flops": round(speedup / bound, 3),
    }  # fmt: skip


def check(problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
    """Compare 64 rows of the last head with masked attention in float64."""
    rows = torch.linspace(0, problem.tokens - 1, 64).long()
    mask = SpanRule(problem.spans[-1], problem.sink).sees(rows[:, None], torch.arange(problem.tokens))
    wide = [t[0, -1].detach().double()[None] for t in (q, k, v)]
    want = F.scaled_dot_product_attention(wide[0][:, rows], wide[1], wide[2], attn_mask=mask[None])[0]
    error = (out[0, -1, rows].detach().double() - want).abs().max().item()
    limit = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[q.dtype]
    if not error <= limit:
        raise SystemExit(f"{problem}: error {error:.2e} above {limit:.0e}; a wrong result is not timed")


def forms(problem: Problem, dtype: str, dim: int) -> None:
    """Prints each form and chunk: measured, and expected, as shares of dense attention's time."""
    q, k, v = problem.draw(DTYPES[dtype], dim, False)
    rule, group, size = SpanRule(problem.spans[0], problem.sink), HEADS // problem.kv_heads, q.element_size()
    plans = {"chosen": choose_bands(rule, 0, problem.tokens, group, dim, size)}
    for chunk in CHUNKS:
        count, tail = divmod(problem.tokens - rule.whole, chunk)
        for form in (tiles, edges, corners):
            band = form(rule, rule.whole, chunk, count) if count > 0 else None
            if band is not None and chunk >= 128:
                last = (tiles(rule, problem.tokens - tail, tail, 1),) if tail else ()
                plans[f"{form.__name__} {chunk}"] = (history(0, rule.whole), band, *last)

    def run(bands: tuple[Band, ...]) -> None:
        with mock.patch.object(cpu, "choose_bands", lambda *_: bands):
            span_attention(q, k, v, spans=rule.span, sink=rule.sink)

    dense = F.scaled_dot_product_attention
    sides = {name: lambda bands=bands: run(bands) for name, bands in plans.items()}
    times = interleaved(
        {"dense": lambda: dense(q, k, v, is_causal=True, enable_gqa=group > 1), **sides}, seconds=4.0, least=3
    )
    whole = HEADS * band_cost(history(0, problem.tokens), 1, size)
    print(f"{problem} {dtype} {dim}: dense {times['dense']:.1f} ms")
    for name, bands in sorted(plans.items(), key=lambda plan: times[plan[0]]):
        expected = problem.kv_heads * sum(band_cost(band, group, size) for band in bands) / whole
        print(f"    {name:14s} {times[name] / times['dense']:.3f} expected {expected:.3f}")


def _with_backward(run, inputs: tuple[torch.Tensor, ...]):  # type: ignore[no-untyped-def]
    def both() -> object:
        out = run()
        return torch.autograd.grad(out, inputs, out.detach())

    return both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 8,192 tokens, spans of an eighth, forward")
    parser.add_argument("--forms", action="store_true", help="print every form and chunk instead")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu_spans.csv"))
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES))
    parser.add_argument("--dims", nargs="*", type=int, default=[64, 128])
    parser.add_argument("--directions", nargs="*", default=["fwd", "fwd+bwd"])
    parser.add_argument("--tokens", nargs="*", type=int, default=[4096, 8192, 16384])
    arguments = parser.parse_args()
    quick = [p for p in PROBLEMS if p.shares == (1 / 8,) and p.tokens <= 8192]
    problems = [p for p in (quick if arguments.quick else PROBLEMS) if p.tokens in arguments.tokens]
    plan = [
        (problem, dtype, dim, direction == "fwd+bwd")
        for dtype in arguments.dtypes
        for dim in arguments.dims
        for direction in (["fwd"] if arguments.quick else arguments.directions)
        for problem in problems
    ]
    if arguments.forms:
        for problem, dtype, dim, backward in plan:
            if not backward and len(problem.shares) == 1:
                forms(problem, dtype, dim)
        return
    write_rows(plan, lambda case: measure(*case), arguments.out)


if __name__ == "__main__":
    main()
