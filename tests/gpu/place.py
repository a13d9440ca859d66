"""Where a test of this folder runs, and the problems it runs on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from attn_plugins.pipelines.benching.oracle import rounding_kernels
from attn_plugins.plan.block_plan import BlockPlan
from tests.support.tolerance import allowance

Leaves = tuple[torch.Tensor, ...]
Attend = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Place:
    """`tiny`: a rehearsal on a CPU."""

    device: torch.device
    backend: str
    tiny: bool = False

    def qkv(
        self,
        tokens: int,
        head_dim: int,
        dtype: torch.dtype,
        heads: int = 4,
        kv_heads: int | None = None,
        batch: int = 1,
        kv_tokens: int | None = None,
        grad: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, H, N, D) views of (B, N, H, D), as projections leave them; always the same numbers for one shape."""
        rng = torch.Generator(self.device).manual_seed(0)
        shapes = [(tokens, heads)] + [(kv_tokens or tokens, kv_heads or heads)] * 2
        q, k, v = (
            torch.randn(batch, n, h, head_dim, generator=rng, device=self.device, dtype=dtype)
            .transpose(1, 2)
            .requires_grad_(grad)
            for n, h in shapes
        )
        return q, k, v

    def lists_plan(
        self, blocks: int, share: float, heads: int = 1, block: int = 64, seed: int = 0, on_device: bool = False
    ) -> BlockPlan:
        """Random lists of whole blocks; `on_device`: made there without the host reading anything, as VMoBA does."""
        device = self.device if on_device else torch.device("cpu")
        rng = torch.Generator(device).manual_seed(seed)
        count = max(1, round(share * blocks))
        scores = torch.rand(1, heads, blocks, blocks, generator=rng, device=device)
        lists = scores.topk(count, dim=-1).indices.sort(-1).values.to(torch.int32)
        counts = torch.full(lists.shape[:3], count, dtype=torch.int32, device=device)
        start = torch.arange(0, blocks * block, block, dtype=torch.int32)
        size = torch.full_like(start, block)
        return BlockPlan(blocks * block, blocks * block, start, size, start, size, lists, counts, counts)

    def grads(self, out: torch.Tensor, leaves: Leaves, dtype: torch.dtype | None = None) -> Leaves:
        """Gradients of the leaves for a random gradient of `out`, rounded to `dtype`: the same one for every caller."""
        rng = torch.Generator(self.device).manual_seed(5)
        upstream = torch.randn(out.shape, generator=rng, device=self.device, dtype=dtype or out.dtype)
        return torch.autograd.grad(out, leaves, upstream.to(out.dtype))

    def check(self, ours: Attend, theirs: Attend, leaves: Leaves) -> None:
        """Output and gradients of `ours`: as near to `theirs` in float64 as the tolerance rule asks.

        The allowance is that of `theirs` in the leaves' precision, by a fused kernel where PyTorch has the choice.
        """
        wide = tuple(t.detach().double().requires_grad_() for t in leaves)
        found, exact = ours(*leaves), theirs(*wide)
        with rounding_kernels(leaves[0]):
            usual = theirs(*leaves)
        rows = [
            (out, *self.grads(out, t, leaves[0].dtype)) for out, t in ((found, leaves), (usual, leaves), (exact, wide))
        ]
        for name, one, other, right in zip(("out", "dq", "dk", "dv"), *rows, strict=True):
            error, allowed = (one.double() - right).abs().max().item(), allowance(other, right)
            assert error <= allowed, f"{name} is off by {error:.2e}, allowed {allowed:.2e}"
            assert one.shape == right.shape and one.dtype == leaves[0].dtype


@contextlib.contextmanager
def counted_launches() -> Iterator[list[str]]:
    """The names of the Triton kernels launched inside."""
    from triton import knobs

    names: list[str] = []

    def note(metadata) -> None:  # type: ignore[no-untyped-def]
        names.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(note)
    try:
        yield names
    finally:
        knobs.runtime.launch_enter_hook.remove(note)


@contextlib.contextmanager
def counted_compiles() -> Iterator[list[str]]:
    """The Triton kernels compiled inside (or taken from the disk cache): one entry per specialisation."""
    from triton import knobs

    names: list[str] = []
    before = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = lambda **found: names.append(found["repr"])
    try:
        yield names
    finally:
        knobs.runtime.jit_post_compile_hook = before
