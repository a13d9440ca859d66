"""Ulysses over gloo processes: does each get its part of what one process computes, and how many bytes does it send?"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attn_plugins.ops import block_sparse_attention
from attn_plugins.patches.context_parallel import Exchange, split
from attn_plugins.pipelines.benching.masks import MASKS, Shape
from attn_plugins.pipelines.benching.network import Layer
from attn_plugins.pipelines.benching.oracle import compare
from attn_plugins.pipelines.benching.sides import Setting

MASK = "sliding"


@dataclass(frozen=True)
class Exchanged:
    """What the processes found.

    Attributes:
        errors: (error, allowed) of the output and the three gradients, the worst of all processes.
        sent: bytes that a process sent to others, forward and backward; `expected`: by the formula, each of both.
    """

    processes: int
    errors: dict[str, tuple[float, float]]
    sent: list[tuple[int, int]]
    expected: float

    @property
    def right(self) -> bool:
        return all(error <= allowed for error, allowed in self.errors.values())

    @property
    def line(self) -> str:
        worst = ", ".join(f"{name} {error:.1e} of {allowed:.1e}" for name, (error, allowed) in self.errors.items())
        sent = " ".join(f"{forward:,}+{backward:,}" for forward, backward in self.sent)
        told = "right" if self.right else "WRONG"
        return (
            f"{self.processes} processes: {told} ({worst}); bytes sent {sent}; by the formula {self.expected:,.0f} each"
        )


class SentBytes(TorchDispatchMode):
    """Counts what this process hands to others in all-to-alls, at the collective itself."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.bytes = rank, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "_c10d_functional" and func._opname == "all_to_all_single":
            x, _, given, *_ = args
            row = x[0].numel() * x.element_size()
            self.bytes += row * sum(rows for device, rows in enumerate(given) if device != self.rank)
        return func(*args, **(kwargs or {}))


def check(processes: int, tokens: int, heads: int, kv_heads: int, head_dim: int) -> Exchanged:
    """Attention under a sliding window by our operator, forward and backward, in float32.

    Raises:
        ValueError: heads that so many processes cannot share.
    """
    expected = Layer(tokens, heads, kv_heads, head_dim, itemsize=4).sent(processes)
    with tempfile.TemporaryDirectory() as folder:
        shape = (tokens, heads, kv_heads, head_dim)
        torch.multiprocessing.spawn(_process, (processes, folder, shape), nprocs=processes)
        found = [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(processes)]
    names = found[0]["errors"]
    errors = {name: max((one["errors"][name] for one in found), key=lambda pair: pair[0] / pair[1]) for name in names}
    return Exchanged(processes, errors, [one["sent"] for one in found], expected)


def _process(rank: int, processes: int, folder: str, shape: tuple[int, int, int, int]) -> None:
    torch.set_num_threads(1)
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)})
    meeting = Path(folder, "meeting").as_uri()
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    try:
        torch.save(_exchanged(rank, processes, *shape), Path(folder, f"{rank}.pt"))
    finally:
        torch.distributed.destroy_process_group()


def _exchanged(rank: int, processes: int, tokens: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    """Of one process: (error, allowed) by name against float64 in one piece, and bytes sent forward and backward."""
    generator = torch.Generator().manual_seed(0)
    counts = (heads, kv_heads, kv_heads, heads)
    q, k, v, upstream = (torch.randn(1, tokens, count, head_dim, generator=generator) for count in counts)
    held = split(tokens, processes)
    mine = slice(sum(held[:rank]), sum(held[: rank + 1]))
    exact, theirs = (_in_one_piece([t.to(dtype) for t in (q, k, v, upstream)]) for dtype in (torch.float64, q.dtype))
    way = Exchange(torch.distributed.group.WORLD, rank, (held,), split(heads, processes), split(kv_heads, processes))
    leaves = [t[:, mine].clone().requires_grad_() for t in (q, k, v)]
    counter = SentBytes(rank)
    with counter:
        whole = [way.gather(t) for t in leaves]
        out = way.scatter(_attend(*whole))
        forward = counter.bytes
        grads = torch.autograd.grad(out, leaves, upstream[:, mine])
    ours = [out.detach(), *grads]
    found = zip(("out", "dq", "dk", "dv"), ours, theirs, exact, strict=True)
    errors = {name: compare(one, other[:, mine], right[:, mine]) for name, one, other, right in found}
    return {"errors": errors, "sent": (forward, counter.bytes - forward)}


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    mask = MASKS[MASK].make(Shape(q.shape[2], q.shape[1], k.shape[1]))
    plan = mask.plan(Setting(q.dtype, q.shape[3], q.device), (q, k, v))
    return block_sparse_attention(q, k, v, plan, backend="cpu")  # type: ignore[return-value]  # no LSE was asked for


def _in_one_piece(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output and gradients (B, N, H, D) by PyTorch's own masked attention."""
    q, k, v, upstream = (t.transpose(1, 2).detach() for t in tensors)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    mask = MASKS[MASK].make(Shape(q.shape[2], q.shape[1], k.shape[1]))
    seen = mask.rows(torch.zeros(1, dtype=torch.int64), torch.arange(mask.shape.tokens))[0]
    gqa = q.shape[1] != k.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=gqa)
    return [t.transpose(1, 2) for t in (out.detach(), *torch.autograd.grad(out, leaves, upstream))]
