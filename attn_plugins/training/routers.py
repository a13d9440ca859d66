"""Routers in training: the balance loss of MoH (arXiv 2410.11842), and what they choose.

The loss is not collected and added up: the one of each layer is tied to its gates, and its gradient joins theirs in the
backward. It is there under checkpointing of either kind, once, and the model needs no second output. How much is due is
read from the main loss, which may be scaled and divided afterwards as anyone likes: `RouterWatch.joined` notes what
gradient arrives there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch


class RouterRow(NamedTuple):
    """What a layer's router did since the last reset.

    balance: E^2 * mean(P f) of all tokens together; K where every unit is chosen alike. entropy: of how the choices
    fall on the units, 1 where they fall evenly. certainty: 1 less the mean entropy of a token's own shares, in the same
    units: 0 where the router has no preference. dead: units that no token was given. load: share of the tokens that
    each unit was given, (E,) floats.
    """

    name: str
    balance: float
    entropy: float
    certainty: float
    dead: int
    load: tuple[float, ...]


@dataclass(eq=False)
class RouterWatch:
    """Watches the routers of a patch: adds the balance loss in training, keeps statistics.

        watch = RouterWatch.of(handle, weight=0.01)
        loss = watch.joined(model(**batch).loss)     # then divide, scale, backward
        rows = watch.rows(); watch.reset()

    Args:
        weight: of the loss; 0: statistics alone. It is the mean over layers.
        over: "item": P and f of each item by itself, so that a batch in four parts has the gradients of the whole;
            "batch": of all the tokens of a call together, as in the paper.

    Raises:
        ValueError: a negative weight, or another word for `over`.
    """

    weight: float = 0.01
    over: str = "item"
    layers: list[LayerWatch] = field(default_factory=list)
    scale: torch.Tensor | float = 1.0  # of the main loss' gradient, in the running backward

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"weight={self.weight}: give 0 or more (the paper's is 0.01)")
        if self.over not in ("item", "batch"):
            raise ValueError(f"over={self.over!r}: legal are 'item' and 'batch'")

    @classmethod
    def of(cls, handle: Any, weight: float = 0.01, over: str = "item") -> RouterWatch:
        """A watch on all layers of a patch (`attn_plugins.patch` returns its handle). `close` ends it."""
        made = cls(weight, over)
        for layer in (layer for patched in handle.patches for layer in patched.layers):
            made.layers.append(LayerWatch(made, layer.name))
            layer.watch = made.layers[-1]
            made._held.append(layer)
        return made

    _held: list[Any] = field(default_factory=list, repr=False)

    def close(self) -> None:
        for layer in self._held:
            if layer.watch in self.layers:  # not a later watch's
                layer.watch = None
        self._held.clear()

    def joined(self, loss: torch.Tensor, share: float = 1.0) -> torch.Tensor:
        """The loss as it is; the balance loss gets the factor by which its gradient arrives here.

        share: of an optimizer step that this backward is, where the loss is not divided by their number: transformers'
            Trainer divides by the tokens of all of them instead, so there it is 1 / gradient_accumulation_steps.
        """
        return _Joined.apply(loss, self, share)

    def rows(self, reduce: Callable[[torch.Tensor], torch.Tensor] | None = None) -> list[RouterRow]:
        """A row for each layer that ran. `reduce`: sums a tensor over processes, if there are several."""
        return [layer.row(reduce) for layer in self.layers if layer.sums is not None]

    def reset(self) -> None:
        for layer in self.layers:
            layer.sums = None


@dataclass(eq=False)
class LayerWatch:
    """One layer's: called by its processor, eagerly, with what its router decided."""

    owner: RouterWatch
    name: str
    sums: torch.Tensor | None = None  # (2, E + 1) float64: shares, then tokens; choices, then entropy

    @torch.compiler.disable(reason="attn_plugins keeps statistics of routers: compile without a watch")
    def __call__(
        self, gates: torch.Tensor, share: torch.Tensor, chosen: torch.Tensor, real: torch.Tensor | None
    ) -> torch.Tensor:
        """gates (B, N, H), share and chosen (B, N, E), real (B, N) bool or None; the gates, as they are."""
        if torch._C._current_graph_task_id() == -1:  # not a checkpoint's recomputation, in the backward
            self._note(share.detach(), chosen, real)
        weight = self.owner.weight / max(1, len(self.owner.layers))
        if weight and torch.is_grad_enabled() and share.requires_grad:
            loss = balance_loss(share, chosen, real, self.owner.over)
            gates = _Tied.apply(gates, weight * loss, self.owner)
        return gates

    def _note(self, share: torch.Tensor, chosen: torch.Tensor, real: torch.Tensor | None) -> None:
        """Sums on the device; nothing is read back."""
        rows = share.new_ones(share.shape[:2]) if real is None else real.to(share.dtype)
        rows = rows.double()[..., None]
        share, chosen = share.double() * rows, chosen * rows
        own = -(share * share.clamp(min=1e-30).log()).sum(-1, keepdim=True)
        found = torch.stack(
            [torch.cat([part, last], dim=-1).sum((0, 1)) for part, last in ((share, rows), (chosen, own))]
        )
        self.sums = found if self.sums is None else self.sums + found

    def row(self, reduce: Callable[[torch.Tensor], torch.Tensor] | None = None) -> RouterRow:
        assert self.sums is not None  # RouterWatch.rows asks those that ran
        sums = self.sums if reduce is None else reduce(self.sums)
        (*share, tokens), (*chosen, own) = sums.tolist()
        experts, tokens = len(share), max(tokens, 1.0)
        load = [count / tokens for count in chosen]
        total, widest = sum(load) or 1.0, math.log(experts) if experts > 1 else 1.0
        spread = -sum(part / total * math.log(part / total) for part in load if part) / widest
        balance = experts * sum(p / tokens * f for p, f in zip(share, load, strict=True))
        dead = sum(not part for part in load)
        return RouterRow(self.name, balance, spread, 1 - own / tokens / widest, dead, tuple(load))


def balance_loss(
    share: torch.Tensor, chosen: torch.Tensor, real: torch.Tensor | None = None, over: str = "item"
) -> torch.Tensor:
    """E^2 * mean_i(P_i f_i): P_i the mean share of unit i, f_i how many of the tokens it was given, as a part of them.

    Args:
        share, chosen: (B, N, E). real: (B, N) bool; padding is left out; None: there is none.
        over: "item": of each item, then the mean over items (those of padding alone count as none); "batch": of all.
    """
    experts = share.shape[-1]
    if real is None:
        real = torch.ones(share.shape[:2], dtype=torch.bool, device=share.device)
    rows = real[..., None].to(share.dtype)
    axes = 1 if over == "item" else (0, 1)
    counts = rows.sum(axes)
    mean = (share * rows).sum(axes) / counts.clamp(min=1)
    part = (chosen * rows).sum(axes) / counts.clamp(min=1)
    losses = experts * (mean * part).sum(-1)
    return losses.sum() / (counts > 0).sum().clamp(min=1) if over == "item" else losses


class _Tied(torch.autograd.Function):
    """The gates, and the gradient of a loss beside theirs."""

    @staticmethod
    def forward(ctx: Any, gates: torch.Tensor, loss: torch.Tensor, owner: RouterWatch) -> torch.Tensor:
        ctx.owner, ctx.dtype, ctx.device = owner, loss.dtype, loss.device
        return gates.view_as(gates)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        scale = torch.as_tensor(ctx.owner.scale, dtype=ctx.dtype, device=ctx.device)
        return grads[0], scale, None


class _Joined(torch.autograd.Function):
    """The loss; notes what gradient arrives here, before the layers get theirs."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, owner: RouterWatch, share: float) -> torch.Tensor:
        ctx.owner, ctx.share = owner, share
        return loss.clone()  # no view: Trainer scales it in place

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.owner.scale = grads[0].detach() * ctx.share
        return grads[0], None, None


def table(rows: list[RouterRow]) -> Iterator[str]:
    """Lines for people, a layer each."""
    yield "layer  balance  entropy  certainty  dead"
    for row in rows:
        yield f"{row.name}  {row.balance:.3f}  {row.entropy:.3f}  {row.certainty:.3f}  {row.dead}"


def tied(gates: torch.Tensor, loss: torch.Tensor, owner: Any) -> torch.Tensor:
    """The gates as they are; their backward adds the loss' gradient, times `owner.scale` as it then is."""
    return _Tied.apply(gates, loss, owner)


def noted(loss: torch.Tensor, owner: Any, share: Any = 1.0) -> torch.Tensor:
    """The loss as it is; its backward sets `owner.scale` to the gradient that arrives, times `share`."""
    return _Joined.apply(loss, owner, share)
