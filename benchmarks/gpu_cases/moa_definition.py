"""One decoding step over rings of kept tokens by definition: what the check goes by. Nothing here is the library's.

Each KV head keeps the first `sink` tokens and the last `ring`. A token at position p >= sink takes place
`sink + (p - sink) mod ring` of its head. Where the heads' places stand is told by `slots_by_head`, and a last slot is
nobody's. All heads of the last batch item are compared, and the gradients of the whole cache slot by slot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from attn_plugins.pipelines.benching.oracle import all_finite, compare, rounding_kernels
from attn_plugins.pipelines.benching.sides import Run, Verdict

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def positions_by_place(tokens: int, sink: int, ring: int) -> torch.Tensor:
    """(sink + ring,): which of `tokens` tokens has each place; there are enough to fill the ring."""
    turn = torch.arange(ring)
    newest = tokens - 1 - sink
    return torch.cat([torch.arange(sink), sink + newest - (newest - turn) % ring])


def slots_by_head(kept: list[int]) -> list[torch.Tensor]:
    """Where the places of heads that keep so many tokens stand in the packed cache.

    First as many whole 512s as each head has, then what each has left; if all keep equally many, or nobody keeps 512,
    one head behind another.
    """
    whole = [n // 512 * 512 for n in kept]
    if min(kept) == max(kept) or max(whole) == 0:
        whole = kept
    found, first, behind = [], 0, sum(whole)
    for n, front in zip(kept, whole, strict=True):
        found.append(torch.cat([torch.arange(first, first + front), torch.arange(behind, behind + n - front)]))
        first, behind = first + front, behind + n - front
    return found


@dataclass(frozen=True)
class StepOverRings:
    """The newest token's query sees the key at j iff `j < sink or tokens - 1 - j < span`.

    Args:
        leaves: q (B, H, 1, D); the packed keys and values (B, slots, D); all keys and values (B, H_kv, tokens, D).
        spans: of each query head; a ring is as long as the longest of its KV head's.
    """

    leaves: tuple[torch.Tensor, ...]
    spans: tuple[int, ...]
    sink: int
    _expected: dict[bool, tuple[list[torch.Tensor], list[torch.Tensor]]] = field(default_factory=dict, repr=False)

    def judge(self, run: Run, gradients: bool) -> Verdict:
        q, _, _, k, v = self.leaves
        generator = torch.Generator(q.device).manual_seed(2)
        upstream = torch.randn(q.shape[1::2], generator=generator, device=q.device, dtype=q.dtype)
        if gradients not in self._expected:
            slots = [slots.to(q.device) for slots in slots_by_head([max(group) + self.sink for group in self._groups])]
            held = [positions_by_place(k.shape[2], self.sink, max(group)).to(q.device) for group in self._groups]
            packed = [t.new_zeros(sum(map(len, slots)) + 1, t.shape[3]) for t in (k, v)]
            for head, (where, at) in enumerate(zip(slots, held, strict=True)):
                for into, t in zip(packed, (k, v), strict=True):
                    into[where] = t[-1, head, at]
            parts, places = (q[-1, :, 0], *packed), list(zip(slots, held, strict=True))
            wide = [t.double() for t in parts]
            exact = self._by_definition(wide, places, upstream.double(), _by_products, gradients)
            with rounding_kernels(q):
                theirs = self._by_definition(parts, places, upstream, _fused, gradients)
            self._expected[gradients] = exact, theirs
        exact, theirs = self._expected[gradients]
        ours = self._ours(run, upstream, gradients)
        names = ("out", "dq", "dk", "dv")[: len(ours)]
        return Verdict({name: compare(*row) for name, *row in zip(names, ours, theirs, exact, strict=True)})

    @property
    def _groups(self) -> list[tuple[int, ...]]:
        size = len(self.spans) // self.leaves[3].shape[1]
        return [self.spans[first : first + size] for first in range(0, len(self.spans), size)]

    def _ours(self, run: Run, upstream: torch.Tensor, gradients: bool) -> list[torch.Tensor]:
        with torch.set_grad_enabled(gradients):
            leaves = [t.detach().requires_grad_(gradients) for t in self.leaves]
            out = run(*leaves)
        found = [all_finite(out.detach())[-1, :, 0]]
        if gradients:
            everywhere = torch.zeros_like(out)
            everywhere[-1, :, 0] = upstream
            dq, dk, dv = (all_finite(t)[-1] for t in torch.autograd.grad(out, leaves[:3], everywhere))
            found += [dq[:, 0], dk, dv]
        return found

    def _by_definition(
        self, parts: list[torch.Tensor] | tuple[torch.Tensor, ...], places: list[tuple[torch.Tensor, torch.Tensor]],
        upstream: torch.Tensor, attend: Attend, gradients: bool,
    ) -> list[torch.Tensor]:  # fmt: skip
        """Output (H, D) and gradients, head by head, in the precision that `parts` have."""
        q, k, v = (t.detach().requires_grad_(gradients) for t in parts)
        newest = self.leaves[3].shape[2] - 1
        outs, first = [], 0
        with torch.set_grad_enabled(gradients):
            for group, (where, at) in zip(self._groups, places, strict=True):
                span = torch.tensor(group, device=q.device)[:, None]
                seen = (at < self.sink) | (newest - at < span)
                outs.append(attend(q[first : first + len(group)], k[where], v[where], seen))
                first += len(group)
            out = torch.cat(outs)
        return [out.detach(), *(torch.autograd.grad(out, (q, k, v), upstream) if gradients else ())]


def _by_products(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    scores = (q @ k.T) * q.shape[1] ** -0.5
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v


def _fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q[None, None], k[None, None], v[None, None], attn_mask=seen)[0, 0]
