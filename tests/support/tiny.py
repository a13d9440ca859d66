"""A random-weight denoiser and inputs for one forward of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch


def randn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class TinyModel:
    """build() -> a model in eval mode; inputs(batch, size) -> its keyword arguments (`size` 0 or 1: two grids).

    per_frame: arguments with a row per frame, not per item; per_item: lists with an entry per item.
    """

    build: Callable[..., Any]
    inputs: Callable[[int, int], dict[str, Any]]
    grids: tuple[tuple[int, ...], tuple[int, ...]]
    per_frame: tuple[str, ...] = ()
    per_item: tuple[str, ...] = ()


def built(name: str, **config: Any) -> Any:
    """A model of the class called `name` with random weights: also where it begins with zeros, which would hide what
    its attention does. A version of diffusers that lacks the class skips the test."""
    import diffusers

    cls = getattr(diffusers, name, None)
    if cls is None:
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    torch.manual_seed(0)
    model = cls(**config).eval()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            if parameter.numel() and not parameter.any():
                parameter.copy_(0.1 * randn(*parameter.shape, seed=number))
    return model


def forward(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The model's output (B, ...), without gradients."""
    with torch.no_grad():
        return output(model, inputs)


def output(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The model's output (B, ...); of a ControlNet all that it adds, in one row per item."""
    out = model(**inputs, return_dict=False) if _says_return_dict(model) else model(**inputs)
    if "ControlNet" in type(getattr(model, "_orig_mod", model)).__name__:
        return torch.cat([part.flatten(1) for part in _tensors(out)], dim=1)
    first = out if isinstance(out, torch.Tensor) else out[0]
    return torch.stack(first) if isinstance(first, list) else first


def _says_return_dict(model: Any) -> bool:
    return "return_dict" in inspect.signature(type(getattr(model, "_orig_mod", model)).forward).parameters


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif value is not None:
        for part in value:
            yield from _tensors(part)
