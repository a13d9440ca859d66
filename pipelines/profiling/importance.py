"""How much each head matters: what the model's output does when the head gives nothing.

Pruning-based importance, as arXiv 1905.10650 and 2303.13731 measure it: one head at a time is
switched off, all else stays. A forward that was kept is run again on as many copies of its input as heads are tried at
once; that copies in one batch change nothing is checked first, and where they do, heads are tried one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from attn_plugins.pipelines.profiling.watching import Watch

Tick = Callable[[str], None]
ALIKE = 1e-3  # relative L2 of a copy in a batch to the forward alone, above which batches are not trusted


def importance(
    watch: Watch, forwards: list[int], copies: int, tick: Tick
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
    """({layer: (heads,) relative change of the output}, and the same of the loss where there is one, else None).

    Change: |out - without| / |out| of the model's first output, mean over the kept forwards. Loss: of a causal language
    model on its own tokens, nats a token more without the head.

    Args:
        forwards: numbers of the kept forwards (steps of a generation) to run again.
        copies: heads that are tried at once, at most.
        tick: called after each try, with what was tried.
    """
    layers = {name: sums for name, sums in watch.layers.items() if sums.heads}
    change = {name: torch.zeros(sums.heads, dtype=torch.float64) for name, sums in layers.items()}
    loss = {name: torch.zeros(sums.heads, dtype=torch.float64) for name, sums in layers.items()}
    has_loss, recording = True, watch.recording
    watch.recording = False
    try:
        for number in forwards:
            again = _Again(watch, number, min(copies, max(sums.heads for sums in layers.values())))
            has_loss = has_loss and again.loss is not None
            for name, sums in layers.items():
                for part in torch.arange(sums.heads).split(again.copies):
                    moved, more = again.without(name, sums.heads, part)
                    change[name][part] += moved / len(forwards)
                    if has_loss and more is not None:
                        loss[name][part] += more / len(forwards)
                    tick(f"{name}, head {int(part[0])}")
    finally:
        watch.off, watch.recording = None, recording
    return change, (loss if has_loss and forwards else None)


class _Again:
    """One kept forward, run again."""

    def __init__(self, watch: Watch, number: int, copies: int) -> None:
        self.watch = watch
        self.args, self.kwargs = watch.forwards[number]
        self.batch = _batch(self.args, self.kwargs)
        self.ids = _ids(self.args, self.kwargs)
        self.plain = self._run(1)
        self.copies = copies if copies > 1 and self._alike(copies) else 1
        self.loss = _loss(self.plain, self.ids, 1)

    def without(self, name: str, heads: int, part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(change, loss) of the heads in `part` (at most `copies`), each switched off in a copy of its own."""
        off = F.one_hot(part, heads).bool().repeat_interleave(self.batch, 0)
        self.watch.off = name, off
        try:
            out = self._run(len(part))
        finally:
            self.watch.off = None
        each = out.reshape(len(part), -1).double()
        plain = self.plain.reshape(1, -1).double()
        change = (each - plain).norm(dim=1) / plain.norm().clamp(min=1e-30)
        found = _loss(out, self.ids, len(part))
        return change.cpu(), None if found is None or self.loss is None else (found - self.loss).cpu()

    def _alike(self, copies: int) -> bool:
        try:
            out = self._run(copies).reshape(copies, -1)
        except (RuntimeError, ValueError, IndexError, TypeError):  # an argument that is no batch, or is one of its own
            return False
        plain = self.plain.reshape(1, -1)
        same = out.shape[1] == plain.shape[1]
        return same and bool(((out - plain).norm(dim=1) <= ALIKE * plain.norm()).all())

    @torch.no_grad()
    def _run(self, copies: int) -> torch.Tensor:
        args, kwargs = (_repeated(value, self.batch, copies) for value in (self.args, self.kwargs))
        return _first(self.watch.root(*args, **kwargs))


def _batch(args: Any, kwargs: Any) -> int:
    """The first axis of the first tensor that a model gets: of its latents, pixels or tokens."""
    tensor = next(
        (value for value in [*args, *kwargs.values()] if isinstance(value, torch.Tensor) and value.ndim), None
    )
    return 1 if tensor is None else tensor.shape[0]


def _ids(args: Any, kwargs: Any) -> torch.Tensor | None:
    ids = kwargs.get("input_ids", args[0] if args else None)
    return ids if isinstance(ids, torch.Tensor) and ids.ndim == 2 and not ids.is_floating_point() else None


def _repeated(value: Any, batch: int, copies: int) -> Any:
    """Tensors of this batch as many times, one copy after the other; all else as it is."""
    if isinstance(value, torch.Tensor):
        fits = copies > 1 and value.ndim > 0 and value.shape[0] == batch
        return value.repeat(copies, *[1] * (value.ndim - 1)) if fits else value
    if type(value) in (list, tuple):
        return type(value)(_repeated(item, batch, copies) for item in value)
    return {key: _repeated(item, batch, copies) for key, item in value.items()} if type(value) is dict else value


def _first(out: Any) -> torch.Tensor:
    """The output itself: the logits of a model with several."""
    if isinstance(out, torch.Tensor):
        return out
    logits = getattr(out, "logits", None)
    found = logits if isinstance(logits, torch.Tensor) else out[0]
    return torch.stack(list(found)) if isinstance(found, (list, tuple)) else found


def _loss(out: torch.Tensor, ids: torch.Tensor | None, copies: int) -> torch.Tensor | None:
    """(copies,) nats a token of causal logits (copies * B, N, V) on their own tokens (B, N); None for other outputs."""
    if ids is None or out.ndim != 3 or out.shape[1] != ids.shape[1] or out.shape[0] != copies * ids.shape[0]:
        return None
    if ids.shape[1] < 2 or int(ids.max()) >= out.shape[2]:
        return None
    each = F.cross_entropy(out[:, :-1].flatten(0, 1).float(), ids.repeat(copies, 1)[:, 1:].flatten(), reduction="none")
    return each.double().view(copies, -1).mean(1)
