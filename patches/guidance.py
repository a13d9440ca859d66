"""Which batch items of a call are for the prompt, and which are the unconditional half of guidance."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from attn_plugins.patches.checkpointing import Weakly
from attn_plugins.patches.grids.arguments import argument
from attn_plugins.runtime import RootState

CONTEXT = "cache_context"
# pipelines whose batches are other than [negative, prompt]
_OTHERWISE = ("PAG", "InstructPix2Pix", "LEdits", "SemanticStableDiffusion", "SEGA")


def check_guides(pipe: object, guidance: str) -> None:
    """Raise where a pipeline's guidance is not known.

    Raises:
        ValueError: a pipeline of another order of batch items, unless `guidance` says which they are.
    """
    name = type(pipe).__name__
    if guidance == "auto" and any(part in name for part in _OTHERWISE):
        raise ValueError(
            f"{name} guides by batches of its own kind: which of their items are for the prompts is not known. Say "
            "guidance='none' (all of them) or 'batched' (the second half)"
        )


def conditional_items(
    root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], batch: int, guidance: str, state: RootState
) -> tuple[int, int]:
    """[start, stop) of the batch items that are for the prompt.

    Pipelines that run the halves of guidance in calls of their own name them (`cache_context`); the others make one
    batch, negative first.

    Raises:
        ValueError: `guidance` is "batched" and the batch has no halves; pipelines that share the model and disagree.
    """
    half, second = state.moment.half, (batch // 2, batch)
    if guidance == "batched" and batch % 2:
        raise ValueError(f"guidance='batched': a batch of {batch} has no negative half and one of prompts")
    if guidance != "auto":
        return second if guidance == "batched" else (0, batch)
    if half is not None and half != "cond_uncond":
        return (0, batch) if half == "cond" else (0, 0)
    if argument(root, args, kwargs, "skip_layers") is not None:  # SD 3's skip-layer guidance: the prompts alone
        return 0, batch
    pipes = state.clock.pipes if state.clock is not None else []  # type: ignore[attr-defined]
    told = "do_classifier_free_guidance"  # a property that has no value before a pipeline's first call
    guided = {bool(getattr(pipe, told)) for pipe in pipes if hasattr(pipe, told)}
    if len(guided) > 1:
        raise ValueError(
            "pipelines that share this model differ in whether they guide: say guidance='batched' or 'none'"
        )
    return second if guided == {True} and batch % 2 == 0 else (0, batch)


class NamedHalves:
    """Stands in for a root's `cache_context`, by which pipelines say what a call is, and notes it."""

    def __init__(self, root: nn.Module, state: RootState) -> None:
        self.root = Weakly(root)
        self.state = state
        self.before = root.__dict__.get(CONTEXT)

    def install(self) -> None:
        self.root.ref().__dict__[CONTEXT] = self

    def restore(self) -> None:
        """What was there before, if anything; another's that has been put over it since stays."""
        root = self.root.ref()
        if root is None or root.__dict__.get(CONTEXT) is not self:
            return
        if self.before is None:
            del root.__dict__[CONTEXT]
        else:
            root.__dict__[CONTEXT] = self.before

    @contextlib.contextmanager
    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        root, moment = self.root.ref(), self.state.moment
        original = self.before or getattr(type(root), CONTEXT).__get__(root)
        before, moment.half = moment.half, name
        try:
            with original(name, *args, **kwargs):
                yield
        finally:
            moment.half = before
