"""The arguments of a running forward, and what is read from their values."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import Any, cast

import torch

from attn_plugins.sequence import Valid

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]


@functools.cache
def _positions(cls: Any) -> dict[str, int]:
    names = list(inspect.signature(cls.forward).parameters)[1:]
    return {name: position for position, name in enumerate(names)}


def argument(root: Any, args: Args, kwargs: Kwargs, name: str) -> Any:
    """The argument `name` of the root's forward, by keyword or by position; None where it was not given."""
    if name in kwargs:
        return kwargs[name]
    position = _positions(cast(Hashable, type(root))).get(name)
    return args[position] if position is not None and position < len(args) else None


def replaced(root: Any, args: Args, kwargs: Kwargs, name: str, value: Any) -> tuple[Args, dict[str, Any]]:
    """The arguments of the root's forward with another value for `name`."""
    position = _positions(cast(Hashable, type(root))).get(name)
    if name not in kwargs and position is not None and position < len(args):
        return (*args[:position], value, *args[position + 1 :]), dict(kwargs)
    return args, {**kwargs, name: value}


class TensorReading:
    """Remembers what was read from the values of a tensor, as long as it is that tensor and nobody has written to it.

    The key is the object (weakly), its version and the other arguments: an address may be reused by a later tensor of
    the same shape.
    """

    def __init__(self, read: Callable[..., Any], limit: int = 8) -> None:
        self.read = read
        self.limit = limit
        self.rows: list[tuple[weakref.ref[torch.Tensor], int, Args, Any]] = []

    def __call__(self, tensor: torch.Tensor, *more: Any) -> Any:
        if tensor.is_inference():  # has no version to tell whether it was written to
            return self.read(tensor, *more)
        for ref, version, given, value in self.rows:
            if ref() is tensor and version == tensor._version and given == more:
                return value
        value = self.read(tensor, *more)
        others = [row for row in self.rows if row[0]() is not None and (row[0]() is not tensor or row[2] != more)]
        self.rows = [*others[-self.limit + 1 :], (weakref.ref(tensor), tensor._version, more, value)]
        return value


def _lengths(mask: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(length) for length in mask.sum(dim=1).tolist())


text_lengths = TensorReading(_lengths)  # of a mask (B, L) of ones and zeros: the number of ones, per item


def _prompt(mask: torch.Tensor, length: int) -> Valid | str:
    mask = mask.reshape(mask.shape[0], -1).bool()
    text = mask[:, :length]
    lengths = text.sum(dim=1)
    at_its_end = (text == (torch.arange(length, device=mask.device) < lengths[:, None])).all() & mask[:, length:].all()
    if not bool(at_its_end):
        return "the prompt's mask is not padding at its end"
    return tuple(int(valid) for valid in lengths.tolist())


_prompt_reading = TensorReading(_prompt)


def prompt_lengths(mask: torch.Tensor | None, length: int) -> Valid | str:
    """The real tokens of a prompt of `length`, per item, from a mask (B, L) or (B, 1, 1, L) of it, or of it and what
    comes behind it; a sentence where the mask is anything else than padding at the prompt's end."""
    return length if mask is None else _prompt_reading(mask, length)
