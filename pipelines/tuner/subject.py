"""What a tuner needs of a model: to run its cases, and to run single forwards of it again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attn_plugins.method import SiteKind
from attn_plugins.targets import Target

Tick = Callable[[str], None]


@dataclass(frozen=True)
class Place:
    """A site that may be patched. `heads`: its query heads, None where nothing tells."""

    name: str
    kind: SiteKind
    heads: int | None = None


@dataclass(frozen=True)
class Probe:
    """One forward of a dense run, to be run again. `at`: its place in the run, 0 to 1. `dense`: what came of it."""

    root: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    at: float
    dense: torch.Tensor


@dataclass(frozen=True)
class Ran:
    """One run of a case. `seconds`: all of it. `forwards`: of the models that can be patched."""

    result: torch.Tensor
    seconds: float
    forwards: int


class Subject(ABC):
    """A model or pipeline that is tuned.

    Attributes:
        obj: what `patch` takes. targets: its models that can be patched. device: where they run.
        places: the sites that methods may have, in order.
        grid: tokens per axis of its calls, (N,) of a text; known after the first `record`.
        loss_name: what `loss` is, in words.
        has_steps: whether a run is a schedule of steps, of which some may stay dense.
        steps: of a run, after the first `record`; None where nothing tells.
    """

    obj: Any
    targets: list[Target]
    device: torch.device
    places: tuple[Place, ...]
    grid: tuple[int, ...]
    loss_name: str
    has_steps: bool
    steps: int | None = None

    @abstractmethod
    def run(self, case: Any) -> Ran:
        """Run one case, as it is patched now. Leaves the global random state alone."""

    @abstractmethod
    def loss(self, result: torch.Tensor, dense: torch.Tensor) -> float:
        """How far a run's result is from the dense run's; 0 where they are the same."""

    @abstractmethod
    def error(self, output: torch.Tensor, dense: torch.Tensor) -> float:
        """The same of one forward, in a measure that adds up over layers: squares, or what grows like them."""

    @abstractmethod
    def record(self, case: Any, count: int) -> tuple[Ran, list[Probe]]:
        """Run a case dense, and keep `count` of its forwards, spread evenly."""

    def size(self, loss: float) -> float:
        """`loss` in the measure of `error`, and back by `root`."""
        return loss

    def root(self, error: float) -> float:
        return error

    @torch.no_grad()
    def again(self, probe: Probe) -> torch.Tensor:
        """What comes of a probe's forward as the model is patched now."""
        # copies: some models take lists apart that they are given
        return first_tensor(probe.root(*kept(probe.args), **kept(probe.kwargs)))


def sentence(error: Exception) -> str:
    """The first line of an error, or its name."""
    return str(error).partition("\n")[0] or type(error).__name__


def first_tensor(output: Any) -> torch.Tensor:
    """A model's main result: the first tensor of what its forward returns.

    Raises:
        ValueError: there is none, but pictures or arrays.
    """
    found = output
    while not isinstance(found, torch.Tensor):
        if hasattr(found, "values") and found:
            found = next(iter(found.values()))
        elif isinstance(found, (list, tuple)) and found:
            found = found[0]
        else:
            raise ValueError(
                f"the call gave {type(found).__name__}, not a tensor: tune needs a pipeline whose call knows "
                'output_type="latent"'
            )
    return found


def kept(value: Any) -> Any:
    """A copy of a forward's argument that nothing else writes to."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: kept(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(kept(item) for item in value)
    return value


def evenly(count: int, of: int) -> list[int]:
    """`count` indices of 0..of - 1, from the middles of equal parts; all of them where there are no more."""
    return sorted({min(int((part + 0.5) * of / count), of - 1) for part in range(min(count, of))})


def relative_square(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b|^2 / |b|^2, in float32 and more."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return float((a.to(wide) - b.to(wide)).square().sum() / b.to(wide).square().sum().clamp_min(1e-30))


def name_of(obj: Any) -> str:
    """What people call a model: its name on the hub, or its folder's; the class where neither is known."""
    known = str(getattr(obj, "name_or_path", None) or "")
    if not known:
        return type(obj).__name__
    return Path(known).resolve().name if Path(known).is_dir() else known


def heads_of(module: nn.Module) -> int | None:
    """Query heads of an attention module, by the names that both libraries use."""
    config = getattr(module, "config", None)
    for holder, name in ((module, "heads"), (module, "num_heads"), (config, "num_attention_heads")):
        value = getattr(holder, name, None)
        if isinstance(value, int):
            return value
    return None


def places_of(targets: Sequence[Target]) -> tuple[Place, ...]:
    """The sites of some targets (targets.find) that all of them have: a pipeline's two transformers are tuned alike.

    Raises:
        ValueError: none, or targets of several families: one recipe cannot be of both.
    """
    each = [
        {site.name: site for site in target.family.find_sites(target.root) if site.kind != "cross"}
        for target in targets
    ]
    names = [name for name in each[0] if all(name in sites for sites in each)] if each else []
    if not names or len({target.family.name for target in targets}) > 1:
        what = ", ".join(type(target.root).__name__ for target in targets) or "this object"
        raise ValueError(f"{what}: no attention but cross-attention that all have alike; tune one model at a time")
    return tuple(Place(name, each[0][name].kind, heads_of(each[0][name].module)) for name in names)
