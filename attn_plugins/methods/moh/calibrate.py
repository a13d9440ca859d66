"""Calibrated, training-free MoH: routers fitted to what each head gives to the output. Ours; the paper has none.

A head's importance for a token is the norm of its part of the output, ||o_i W_O^i||. A ridge regression tells it from
the layer's input before anything is computed; a token gets the heads that it says most of.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from attn_plugins.method import AttentionCall
from attn_plugins.methods.moh.attention import attend, real_tokens
from attn_plugins.methods.moh.budgets import BUDGETS, allotted
from attn_plugins.methods.moh.moments import Moments
from attn_plugins.methods.moh.processor import MoHProcessor

PENALTY = 1e-2
SITE = "_attn_plugins"  # where a patched layer hangs on its module
GENTLE = 0.05  # of logits fitted to importance: gates of a calibrated learned router begin near 1, chosen by its order


@dataclass(frozen=True)
class Calibration:
    """What was found for a layer.

    shared, routed: heads (or KV groups) by number; count: K; fit: share of the variance of the importances that the
    regression explains, on the tokens it was fitted to.
    """

    name: str
    shared: tuple[int, ...]
    routed: tuple[int, ...]
    count: int
    fit: float


def calibrate(
    target: Any,
    batches: Iterable[Any],
    *,
    run: Callable[[Any, Any], Any] | None = None,
    penalty: float = PENALTY,
    budgets: str = "equal",
    progress: bool = True,
) -> list[Calibration]:
    """Fill the routers of a patched model from a few batches, in place. Heads keep their mean number, `active`.

    The model runs dense, without gradients, as it is (call `eval()` first). Per layer the heads of the largest mean
    importance become the shared ones; the others are routed by a ridge regression of their importances on the input.
    Routers of kind "learned" get the same order as logits so small that their gates begin near 1: a start for tuning.

    Args:
        target: the handle of `attn_plugins.patch(model, "moh", router="ridge" or "learned", ...)`, or the model.
        batches: a mapping of keyword arguments of the model's forward, a tuple of positional ones, or one tensor, each.
            Some thousand tokens are enough: of a layer C wide, more than C of them. Padding is left out.
        run: run(model, batch) instead of the model's forward: for a pipeline, which calls the model itself.
        penalty: of the regression, as a share of the mean square of an input channel.
        budgets: "equal": every layer gets as many heads; "global": heads go to the layers where the next one gives the
            largest share of what all of the layer's give.
        progress: show a bar.

    Returns:
        A row per layer, in order. Memory: (C + 1)^2 numbers of 8 bytes a layer while it runs.

    Raises:
        ValueError: nothing to fill, no batches, batches that ran none of the layers or whose sums are not finite, or
            an illegal option.
        TypeError: one batch instead of several.
    """
    if penalty <= 0:
        raise ValueError(f"penalty={penalty}: give a number above 0")
    if budgets not in BUDGETS:
        raise ValueError(f"budgets={budgets!r}: legal are {', '.join(map(repr, BUDGETS))}")
    if isinstance(batches, (Mapping, torch.Tensor)):
        raise TypeError(f"batches is one {type(batches).__name__}: give a list of such, [batch]")
    roots = list(getattr(target, "roots", None) or [target])
    found = [one for root in roots for one in _layers(root)]
    if not found:
        raise ValueError(
            "no router to calibrate: patch with attn_plugins.patch(model, 'moh', router='ridge', ...) first; query "
            "norms have no weights"
        )
    call = run or _forward
    with contextlib.ExitStack() as held, torch.no_grad():
        for one in found:
            held.enter_context(one.listening())
        count = 0
        for batch in _shown(batches, progress):
            count += 1
            for root in roots:
                call(root, batch)
    if not count:
        raise ValueError("batches is empty: give some of what the model is for")
    silent = [one.name for one in found if not one.moments.count]
    if silent:
        raise ValueError(f"{len(silent)} layers ran dense or not at all in these batches, {silent[0]} among them")
    broken = [one.name for one in found if not one.moments.finite]
    if broken:
        raise ValueError(
            f"{len(broken)} layers, {broken[0]} among them, saw nan or inf in these batches: no router was changed"
        )
    given = [one.router.budget for one in found]
    actives = allotted(
        [one.moments.marginal() for one in found],
        sum(budget.active for budget in given),
        [budget.shared + 1 for budget in given],
        None if budgets == "global" else [budget.active for budget in given],
    )
    return [one.fill(active, penalty) for one, active in zip(found, actives, strict=True)]


@dataclass(eq=False)
class _Layer:
    """A patched layer while it is calibrated."""

    name: str
    layer: Any
    module: nn.Module
    router: Any  # HeadRouter, or PEFT's wrapper of one, which has its attributes
    moments: Moments = field(init=False)

    def __post_init__(self) -> None:
        self.moments = Moments(self.router.budget.units)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """The layer runs dense, and its calls are noted."""
        before = self.layer.processor
        self.layer.processor = _Listening(before.config, self)
        try:
            yield
        finally:
            self.layer.processor = before

    def importances(self, out: torch.Tensor) -> torch.Tensor:
        """Squared norms of each unit's part of the output, (B, N, U); of o itself where the projection is not known.

        A group's is the sum over its heads.
        """
        wide = out.float()
        weight = self._projection()
        if weight is None:
            squares = wide.square().sum(-1)
        else:
            parts = weight.float().unflatten(1, (out.shape[1], out.shape[3]))  # (C, H, D)
            gram = torch.einsum("chd,che->hde", parts, parts)
            squares = ((wide @ gram) * wide).sum(-1).clamp(min=0)
        return squares.unflatten(1, (-1, self.router.budget.group)).sum(2).transpose(1, 2)

    def _projection(self) -> torch.Tensor | None:
        name = self.router.output
        weight = None if name is None else getattr(self.module.get_submodule(name), "weight", None)
        usable = isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.ndim == 2
        return weight if usable else None

    def fill(self, active: int, penalty: float) -> Calibration:
        """Give the router what was found; `active` units of each token are the layer's."""
        budget, moments = self.router.budget, self.moments
        ranked = moments.means().argsort(descending=True, stable=True)
        shared = ranked[: budget.shared].sort().values
        routed = ranked[budget.shared :].sort().values
        units = torch.cat([shared, routed])
        if self.router.kind == "ridge":
            coefficients, intercept = moments.ridge(penalty)
            self.router.fill(units, active - budget.shared, coefficients[routed], intercept[routed])
        else:
            self.router.fill(units, active - budget.shared, GENTLE * moments.ridge_of_differences(penalty)[routed])
        fit = moments.fit(penalty)
        return Calibration(self.name, tuple(shared.tolist()), tuple(routed.tolist()), active - budget.shared, fit)


@dataclass(frozen=True, eq=False)
class _Seen:
    """A layer's input, in the place of a routing."""

    x: torch.Tensor

    @property
    def tokens(self) -> torch.Size:
        return self.x.shape[:2]


class _Listening(MoHProcessor):
    """Dense attention that notes inputs and importances."""

    def __init__(self, config: Any, listener: _Layer) -> None:
        super().__init__(config)
        self.listener = listener

    def prepare(self, x: torch.Tensor, weights: Any) -> Any:
        return _Seen(x)

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        out = attend(call, None, skip=False)
        real, squares = real_tokens(call), self.listener.importances(out)
        x = call.prepared.x
        if real is not None:
            x, squares = x[real], squares[real]
        self.listener.moments.add(x.reshape(-1, x.shape[-1]), squares.reshape(-1, squares.shape[-1]))
        return out


def _layers(root: nn.Module) -> list[_Layer]:
    rows = []
    for module in root.modules():
        layer = module.__dict__.get(SITE)
        if isinstance(getattr(layer, "processor", None), MoHProcessor):
            router = layer.weights_of(module)  # type: ignore[union-attr]
            if router is not None:
                rows.append(_Layer(layer.name, layer, module, router))  # type: ignore[union-attr]
    return rows


def _forward(model: Any, batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return model(batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(**batch)


def _shown(batches: Iterable[Any], progress: bool) -> Iterable[Any]:
    if not progress:
        return batches
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return batches
    return tqdm(batches, desc="calibrating routers", leave=False)
