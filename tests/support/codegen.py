"""The codegen lock: what each Triton kernel of the library compiles to, for each target, precision and head size.

A launch is a function that calls one of the library's own launchers. Lines are made by compiling offline
(`tools/lock.py`), kept in tests/triton/codegen.csv, and compared in tests/tools/test_lock.py.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tests.support.offline import TARGETS, offline
from tests.support.resources import resources

if TYPE_CHECKING:
    from attn_plugins.ops.vmoba.layout import Layout

LOCK = Path(__file__).resolve().parent.parent / "triton" / "codegen.csv"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, order=True)
class Case:
    """One launch, which may compile several kernels."""

    launch: str
    target: str
    dtype: str
    head_dim: int


@dataclass(frozen=True, order=True)
class Line:
    """One kernel of a case. `config`: its tile and other constants, warps and stages."""

    launch: str
    target: str
    dtype: str
    head_dim: int
    kernel: str
    config: str
    registers: int
    spills: int
    shared: int
    tensor_core: int

    @property
    def case(self) -> Case:
        return Case(self.launch, self.target, self.dtype, self.head_dim)

    @property
    def name(self) -> tuple[str, str, str, int, str]:
        return (self.launch, self.target, self.dtype, self.head_dim, self.kernel)


def decode(dtype: torch.dtype, head_dim: int, group: int = 4, positions: bool = True) -> None:
    """32 rings of 2,048 tokens."""
    from attn_plugins.ops.decode.inputs import Positions
    from attn_plugins.ops.decode.triton.launch import forward

    total, kv_heads = 65_536, 32
    q = torch.empty(1, group * kv_heads, 1, head_dim, dtype=dtype, device="meta")
    k = torch.empty(1, total, head_dim, dtype=dtype, device="meta")
    numbers = torch.empty(1, total, dtype=torch.int64, device="meta")
    ranges = torch.empty(1, kv_heads, 1, 2, dtype=torch.int64, device="meta")
    rule = Positions(numbers, numbers[:, :1], numbers[0, : q.shape[1]], 64) if positions else None
    forward(q, k, k, ranges, rule, 0.1)


def block_sparse(dtype: torch.dtype, head_dim: int, rule: str) -> None:
    """Forward and backward over blocks of 128: listed whole, cut by row intervals (windows), or by a mask of bits."""
    from attn_plugins.ops.block_sparse.triton.launch import backward, forward
    from attn_plugins.plan.block_plan import BlockPlan
    from attn_plugins.sequence import Sequence

    blocks = [(start, 128) for start in range(0, 512, 128)]
    if rule == "whole blocks":
        plan = BlockPlan.from_lists(blocks, blocks, [[0, 1], [1], [2, 3], [0, 3]])
    elif rule == "windows":
        plan = BlockPlan.from_windows(Sequence((512,)), 160, 1, q_tile=(128,), kv_tile=(128,))
    else:
        plan = BlockPlan.from_mask(torch.ones(512, 512, dtype=torch.bool).tril(), 128, 128)
    q, k = (torch.zeros(1, heads, 512, head_dim, dtype=dtype) for heads in (4, 2))
    out, lse = forward(q, k, k, plan, 0.1)
    backward(q, None, q, k, k, out, lse, plan, 0.1)


def block_rows(dtype: torch.dtype, head_dim: int, causal: bool = False) -> None:
    """Forward and backward over blocks of 128 and more, chosen by each query; causal: in a text, as MoBA does."""
    from attn_plugins.ops.vmoba.triton.launch import backward, forward

    one = _layout(causal)
    q, k = (torch.zeros(1, heads, one.sequence.length, head_dim, dtype=dtype) for heads in (4, 2))
    selected = torch.zeros(1, 4, one.sequence.tokens, one.count, dtype=torch.bool)
    out, lse = forward(q, k, k, selected, one, 0.1, causal)
    backward(q, None, q, k, k, out, lse, selected, one, 0.1, causal)


def block_gate(dtype: torch.dtype, head_dim: int) -> None:
    """The mean keys of 72 blocks, the best of them for each query, and the scores of all."""
    from attn_plugins.ops.vmoba.triton.gate import best, scores

    one = _layout(False, blocks=72)
    q, k = (torch.zeros(1, heads, one.sequence.length, head_dim, dtype=dtype) for heads in (4, 2))
    best(q, k, one, 18, False)
    scores(q, k, one, True)


def agent(dtype: torch.dtype, head_dim: int, bias: bool, agents: int = 256, tokens: int = 4096) -> None:
    """Agents of tokens in 8 heads: they gather from a few keys each program, and all rows read them."""
    from attn_plugins.ops.agent.triton.launch import attend, attend_backward

    means, k = (torch.empty(1, n, 8, head_dim, dtype=dtype, device="meta").transpose(1, 2) for n in (agents, tokens))
    for q, kv in ((means, k), (k, means)):
        rule = torch.empty(1, 8, q.shape[2], kv.shape[2], dtype=dtype, device="meta") if bias else None
        values = q if q is k and not bias else None
        out, lse = attend(q, kv, kv, rule, 0.1, values, 0.075)
        attend_backward(out, q, kv, kv, rule, out, lse, 0.1, bias, values, 0.075)


def routed_heads(dtype: torch.dtype, head_dim: int, causal: bool = True, keep: bool = False) -> None:
    """The rows of 8 query heads on 2 KV heads, as projections leave them."""
    from attn_plugins.ops.routed_heads.triton.launch import forward

    q, k = (torch.empty(1, 2048, n, head_dim, dtype=dtype, device="meta").transpose(1, 2) for n in (8, 2))
    gates = torch.empty(1, 2048, 8, dtype=dtype, device="meta")
    bounds = torch.empty(1, 2, dtype=torch.int64, device="meta") if keep else None
    forward(q, k, k, gates, gates.bool(), bounds, causal, 0.1, keep)


def weighted_merge(dtype: torch.dtype, head_dim: int, rows: int = 3, tokens: int = 4, lengths: bool = False) -> None:
    """Two references in a layer of SDXL with guidance."""
    from attn_plugins.ops.weighted_merge.triton.launch import forward, weights

    q = torch.empty(2, 4096, 10, head_dim, dtype=dtype, device="meta").transpose(1, 2)
    phrases = torch.empty(1, 2, rows, 10, head_dim, dtype=dtype, device="meta").transpose(2, 3)
    images = torch.empty(2, 2, tokens, 10, head_dim, dtype=dtype, device="meta").transpose(2, 3)
    counts = torch.empty(1, 2, dtype=torch.int64, device="meta")
    masks = torch.empty(1, 2, 4096, device="meta") if lengths else None
    strengths = weights(q, phrases, counts, masks, 0.1, 1.0, 0.0 if lengths else None)
    forward(q, q, images, images, strengths, counts if lengths else None, 0.1)


def _layout(causal: bool, blocks: int = 4) -> Layout:
    from attn_plugins.ops.vmoba.layout import decode, encode
    from attn_plugins.sequence import Sequence

    if causal:
        return decode(encode(Sequence((512,)), (128,), (128,)))[0][1]
    return decode(encode(Sequence((blocks, 16, 16), 16), (1, 16, 16), (1, 16, 16)))[0][1]


LAUNCHES: dict[str, Callable[[torch.dtype, int], None]] = {
    "decode": decode,
    "decode, all keys seen": lambda dtype, head_dim: decode(dtype, head_dim, positions=False),
    "decode, 32 rows": lambda dtype, head_dim: decode(dtype, head_dim, group=32),
    "block sparse, whole blocks": lambda dtype, head_dim: block_sparse(dtype, head_dim, "whole blocks"),
    "block sparse, windows": lambda dtype, head_dim: block_sparse(dtype, head_dim, "windows"),
    "block sparse, bits": lambda dtype, head_dim: block_sparse(dtype, head_dim, "bits"),
    "block rows": block_rows,
    "block rows, causal": lambda dtype, head_dim: block_rows(dtype, head_dim, causal=True),
    "block gate": block_gate,
    "agent": lambda dtype, head_dim: agent(dtype, head_dim, bias=False),
    "agent, biases": lambda dtype, head_dim: agent(dtype, head_dim, bias=True),
    "agent, odd biases": lambda dtype, head_dim: agent(dtype, head_dim, bias=True, agents=49, tokens=197),
    "weighted merge": weighted_merge,
    "weighted merge, long": lambda dtype, head_dim: weighted_merge(dtype, head_dim, 75, 257, lengths=True),
    "routed heads, causal": routed_heads,
    "routed heads": lambda dtype, head_dim: routed_heads(dtype, head_dim, causal=False),
    "routed heads, for a backward": lambda dtype, head_dim: routed_heads(dtype, head_dim, keep=True),
}
# Launch -> precision -> head sizes. Float16 compiles as bfloat16 does, so that one size of it is enough.
TABLE: dict[str, dict[str, tuple[int, ...]]] = {
    "decode": {"bf16": (64, 80, 128, 256), "fp16": (128,), "fp32": (64, 128, 256)},
    "decode, all keys seen": {"bf16": (128,)},
    "decode, 32 rows": {"bf16": (64, 128)},
    "block sparse, whole blocks": {"bf16": (64, 128), "fp32": (128,)},
    "block sparse, windows": {"bf16": (32, 64, 80, 128, 256), "fp16": (128,), "fp32": (64, 128)},
    "block sparse, bits": {"bf16": (128,)},
    "block rows": {"bf16": (64, 128), "fp32": (128,)},
    "block rows, causal": {"bf16": (128,)},
    "block gate": {"bf16": (128,)},
    "agent": {"bf16": (40, 64, 80, 128), "fp32": (64, 128)},
    "agent, biases": {"bf16": (40, 64, 80, 128), "fp32": (64, 128)},
    "agent, odd biases": {"bf16": (64, 128)},
    "weighted merge": {"bf16": (40, 64, 160), "fp16": (64,), "fp32": (64, 160)},
    "weighted merge, long": {"bf16": (64, 128, 160), "fp32": (128, 160)},
    "routed heads, causal": {"bf16": (40, 64, 80, 128), "fp16": (128,), "fp32": (64, 128)},
    "routed heads": {"bf16": (64, 128)},
    "routed heads, for a backward": {"bf16": (64, 128), "fp32": (128,)},
}


def cases() -> list[Case]:
    """The whole table."""
    rows = [(name, dtype, dim) for name, kinds in TABLE.items() for dtype, dims in kinds.items() for dim in dims]
    return [Case(name, target, dtype, dim) for name, dtype, dim in rows for target in TARGETS]


def compile_case(case: Case) -> list[Line]:
    """Compile the kernels of a case: one line each, in the order of their launches.

    Raises:
        triton.runtime.errors.OutOfResources: a kernel wants more shared memory than the target has.
    """
    with offline(case.target) as kernels:
        LAUNCHES[case.launch](DTYPES[case.dtype], case.head_dim)
    return [Line(*astuple(case), kernel.name, _config(kernel), *astuple(resources(kernel))) for kernel in kernels]


def _config(kernel: object) -> str:
    """Capitalised constants of a kernel by name, then warps and stages."""
    names = kernel.src.fn.arg_names  # type: ignore[attr-defined]
    constants = {names[path[0]]: value for path, value in kernel.src.constants.items()}  # type: ignore[attr-defined]
    shown = [f"{name}={value}" for name, value in constants.items() if name.isupper() and value is not None]
    metadata = kernel.metadata  # type: ignore[attr-defined]
    fusion = [] if metadata.enable_fp_fusion else ["unfused"]
    return " ".join([*shown, f"warps={metadata.num_warps}", f"stages={metadata.num_stages}", *fusion])


def faults(lines: Iterable[Line]) -> list[str]:
    """What no kernel may do, whatever the lock says: spill, outgrow the target, leave fusion to Triton's version."""
    found = []
    for line in lines:
        shown = f"{line.kernel} ({line.launch}) for {line.target} {line.dtype} D={line.head_dim}"
        if line.config.endswith("unfused"):
            found.append(f"{shown}: launched without the OPTIONS of attn_plugins/ops/target.py")
        if line.spills:
            found.append(f"{shown}: {line.spills} spills with {line.config}")
        if line.shared > TARGETS[line.target][3]:
            found.append(f"{shown}: {line.shared} bytes of shared memory, the target has {TARGETS[line.target][3]}")
    return found


def changes(lines: Iterable[Line], locked: Iterable[Line]) -> list[str]:
    """Differences to the lock, of the cases that `lines` has."""
    have, want = list(lines), list(locked)
    compiled = {line.case for line in have}
    want = [line for line in want if line.case in compiled]
    return [f"now:    {line}" for line in have if line not in want] + [
        f"locked: {line}" for line in want if line not in have
    ]


def read_lock(path: Path = LOCK) -> tuple[str, list[Line]]:
    """Triton's version and the lines."""
    kinds = {field.name: int if field.type == "int" else str for field in fields(Line)}
    with path.open(newline="") as file:
        version = file.readline().removeprefix("# triton").strip()
        return version, [
            Line(**{name: kinds[name](value) for name, value in row.items()}) for row in csv.DictReader(file)
        ]


def write_lock(version: str, lines: Iterable[Line], path: Path = LOCK) -> None:
    with path.open("w", newline="") as file:
        file.write(f"# triton {version}\n")
        writer = csv.DictWriter(file, [field.name for field in fields(Line)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(line) for line in sorted(lines))
