"""Agent attention as a row of plain attentions, forward and backward, whatever computes those.

A backend is two functions, `attend` and `attend_backward`; what stands here is how they follow one another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"]


@dataclass(frozen=True)
class Setting:
    """What is no tensor: scales of both steps, the shortcut, and how many rows at either end of q are exact."""

    scales: Sequence[float]
    shortcut: float
    exact: Sequence[int]

    def rows(self, t: torch.Tensor) -> slice:
        """The rows that read the agents, of a tensor with q's length."""
        return slice(self.exact[0], t.shape[2] - self.exact[1])

    def exact_rows(self, t: torch.Tensor) -> Iterator[slice]:
        for rows in (slice(0, self.exact[0]), slice(t.shape[2] - self.exact[1], t.shape[2])):
            if rows.stop > rows.start:
                yield rows


class Backend(Protocol):
    """q (B, H, Nq, D), k and v (B, H_kv, Nk, D), a bias that broadcasts to (B, H, Nq, Nk)."""

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor | None,
        scale: float,
        values: torch.Tensor | None = None,
        shortcut: float = 0.0,
        into: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Softmax attention, plus `shortcut` times `values` (B, H_kv, Nq, D): output, in q's layout, and LSE.

        The output is `into`, where that is given.
        """

    def attend_backward(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        lse: torch.Tensor,
        scale: float,
        wants_bias: bool,
        values: torch.Tensor | None = None,
        shortcut: float = 0.0,
    ) -> Gradients:
        """Gradients of q, k, v and the bias (None unless wanted); that of `values` is left to the caller."""


def forward(
    backend: Backend,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    agents: torch.Tensor,
    biases: tuple[torch.Tensor | None, torch.Tensor | None],
    setting: Setting,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output and LSE of q's rows, (B, H, Nq, D) and (B, H, Nq), and of the agents, (B, H, n, D) and (B, H, n)."""
    gathered, gathered_lse = backend.attend(agents, k, v, biases[0], setting.scales[0])
    rows = setting.rows(q)
    values = v[:, :, rows] if setting.shortcut else None
    last = agents, gathered, _of_rows(biases[1], rows), setting.scales[1], values, setting.shortcut
    if not any(setting.exact):
        return *backend.attend(q, *last), gathered, gathered_lse
    out, lse = torch.empty_like(q), gathered_lse.new_empty(q.shape[:3])
    lse[:, :, rows] = backend.attend(q[:, :, rows], *last, into=out[:, :, rows])[1]
    for own in setting.exact_rows(q):
        lse[:, :, own] = backend.attend(q[:, :, own], k, v, None, setting.scales[0], into=out[:, :, own])[1]
    return out, lse, gathered, gathered_lse


def backward(
    backend: Backend,
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    agents: torch.Tensor,
    biases: tuple[torch.Tensor | None, torch.Tensor | None],
    out: torch.Tensor,
    lse: torch.Tensor,
    gathered: torch.Tensor,
    gathered_lse: torch.Tensor,
    setting: Setting,
    wants: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of q, k, v, agents and the two biases (None where not wanted), summed in one fixed order."""
    rows = setting.rows(q)
    values = v[:, :, rows] if setting.shortcut else None
    rows_q, grad_agents, grad_gathered, grad_rows = backend.attend_backward(
        grad[:, :, rows], q[:, :, rows], agents, gathered, _of_rows(biases[1], rows), out[:, :, rows], lse[:, :, rows],
        setting.scales[1], wants[1], values, setting.shortcut,
    )  # fmt: skip
    first, grad_k, grad_v, grad_aggregate = backend.attend_backward(
        grad_gathered, agents, k, v, biases[0], gathered, gathered_lse, setting.scales[0], wants[0]
    )
    grad_agents += first
    grad_q = rows_q
    if any(setting.exact):
        grad_q = torch.empty_like(q)
        grad_q[:, :, rows] = rows_q
    for own in setting.exact_rows(q):
        grad_q[:, :, own], more_k, more_v, _ = backend.attend_backward(
            grad[:, :, own], q[:, :, own], k, v, None, out[:, :, own], lse[:, :, own], setting.scales[0], False
        )
        grad_k += more_k
        grad_v += more_v
    if values is not None:
        of_values = grad[:, :, rows].unflatten(1, (v.shape[1], -1))
        grad_v[:, :, rows] += setting.shortcut * (of_values.sum(2) if of_values.shape[2] > 1 else of_values[:, :, 0])
    grad_broadcast = grad_rows
    if grad_rows is not None and biases[1] is not None and grad_rows.shape != biases[1].shape:
        grad_broadcast = torch.zeros_like(biases[1])
        grad_broadcast[:, :, rows] = grad_rows
    return grad_q, grad_k, grad_v, grad_agents, grad_aggregate, grad_broadcast


def _of_rows(bias: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return bias if bias is None or bias.shape[2] == 1 else bias[:, :, rows]
