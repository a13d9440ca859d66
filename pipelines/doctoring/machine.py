"""What this machine does with attention and with the rest of a block, measured in a second or two.

Enough for an estimate of where a step's time goes, for that needs ratios alone. So a CPU is timed in one thread, by the
time that this thread gets: on a machine that others use too, waiting for them would be what is measured.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from attn_plugins.method import AttentionCall, Processor, SiteKind
from attn_plugins.pipelines.stopwatch import now
from attn_plugins.sequence import Sequence

BUDGET = 1e10  # FLOPs of the attention that is timed on a CPU; a GPU gets 250 times as much
ROWS, WIDTH = 512, 1024  # of the block that is timed, at most: wider ones run at about the same rate
REPEATS = 4
DENSE = 0.9  # a density above which an operator has nothing to show


@dataclass(frozen=True)
class Machine:
    """FLOP/s of dense attention (every pair counted, also those that causality hides), and of the linear layers of a
    block, with the norms and activations between them in the time.

    device, dtype: what was measured on.
    """

    device: str
    dtype: str
    linear: float
    attention: float

    @property
    def described(self) -> str:
        """ "cpu float32, one thread: linear 50 GFLOP/s, attention 70"."""
        threads = ", one thread" if self.device == "cpu" else ""
        linear, attention = (f"{rate / 1e9:,.0f}" for rate in (self.linear, self.attention))
        return f"{self.device} {self.dtype}{threads}: linear {linear} GFLOP/s, attention {attention}"

    def seconds(self, attention: float, linear: float) -> float:
        """Of a forward of so many FLOPs of each."""
        return attention / self.attention + linear / self.linear


@dataclass(frozen=True)
class Probe:
    """Dense attention on a grid small enough to be timed: what operators are held against."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sequence: Sequence
    kind: SiteKind
    seconds: float

    def efficiency(self, processor: Processor) -> float | None:
        """The share of the gain that its density promises which an operator reaches here; None where it promises none.

        Index building is part of the time, the making of a static plan is not: it is made once.
        """
        density = processor.density(self.sequence)
        call = self._call()
        if density > DENSE or processor.refuses(call) is not None:
            return None
        with one_thread():
            seconds = _fastest(lambda: processor(self._call()), self.q.device)
        return density * self.seconds / seconds

    def _call(self) -> AttentionCall:
        return AttentionCall(self.q, self.k, self.v, self.kind, self.sequence, causal=self.kind == "causal")


def measure(kind: SiteKind, sequence: Sequence, head_dim: int, width: int) -> tuple[Machine, Probe]:
    """Time the linear layers of a block `width` wide, and dense attention of a few heads of a layer of this kind.

    Args:
        sequence: the tokens that are asked about; timed is a grid of the same proportions within `BUDGET`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    heads, budget = (8, 250 * BUDGET) if device.type == "cuda" else (1, BUDGET)  # a GPU is not full with one head
    small = smaller(sequence, head_dim, budget / heads)
    q, k, v = (randn(1, heads, small.length, head_dim) for _ in range(3))
    causal = kind == "causal"
    width = min(width, WIDTH)
    x = randn(ROWS, width)
    square, up, down = (
        randn(*sizes) / width**0.5 for sizes in ((width, width), (4 * width, width), (width, 4 * width))
    )

    def rest() -> torch.Tensor:
        """A block without its attention: norms, four square linears, the feed-forward, residuals."""
        h = F.layer_norm(x, (width,)) * 1.5 + 0.5
        heads = [F.rms_norm(F.linear(h, square), (width,)) for _ in range(2)] + [F.linear(h, square)]
        h = x + F.linear(heads[0] * heads[1] + heads[2], square)
        return h + F.linear(F.gelu(F.linear(F.layer_norm(h, (width,)) * 1.5 + 0.5, up)), down)

    with one_thread():
        seconds = _fastest(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal), device)
        of_rest = _fastest(rest, device)
    machine = Machine(
        device.type, str(dtype).removeprefix("torch."), 2.0 * ROWS * 12 * width**2 / of_rest,
        4.0 * small.length**2 * head_dim * heads / seconds,
    )  # fmt: skip
    return machine, Probe(q, k, v, small, kind, seconds)


def smaller(sequence: Sequence, head_dim: int, budget: float) -> Sequence:
    """A sequence whose attention of one head is within `budget` FLOPs, where it can be: axes become parts of
    themselves, the least shortened one first, so that tiles fit as before; text shrinks as the whole does."""
    text, grid = sequence.text_before + sequence.text_after, list(sequence.grid)
    most = (budget / (4.0 * head_dim)) ** 0.5
    while True:
        kept = math.prod(grid) / sequence.tokens
        if kept * sequence.length <= most or max(grid) == 1:
            return Sequence(tuple(grid), text_before=int(text * kept))
        axis = max(range(len(grid)), key=lambda axis: (grid[axis] > 1, grid[axis] / sequence.grid[axis], grid[axis]))
        size = sequence.grid[axis]
        grid[axis] = max(part for part in range(1, grid[axis]) if size % part == 0)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch's CPU work in one thread inside the block, as many as before after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def _fastest(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest call, after one that is not counted."""
    call()
    seconds = []
    for _ in range(REPEATS):
        start = _clock(device)
        call()
        seconds.append(_clock(device) - start)
    return min(seconds)


def _clock(device: torch.device) -> float:
    return time.thread_time() if device.type == "cpu" else now(device)
