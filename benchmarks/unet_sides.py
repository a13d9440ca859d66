"""What `benchmarks/unet.py` sets beside a dense UNet: two methods of the library, tomesd and ToDo."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import attn_plugins
from attn_plugins.runtime import device_of
from attn_plugins.sequence import Sequence

Cost = Callable[[int], float]


@dataclass(frozen=True)
class Side:
    """`apply(unet)`: a context in which the UNet runs this way; it gives its cost in dense attention's, by tokens."""

    name: str
    setting: str
    version: str
    apply: Callable[[Any], AbstractContextManager[Cost]]


@contextmanager
def dense(unet: Any) -> Iterator[Cost]:
    yield lambda tokens: 1.0


def library(method: str, **options: Any) -> Side:
    @contextmanager
    def apply(unet: Any) -> Iterator[Cost]:
        with attn_plugins.patched(unet, method, dense_steps=0, **options) as handle:
            layer = handle.patches[0].layers[0]
            least = layer.root.least_tokens(device_of(unet))
            yield lambda tokens: 1.0 if tokens < least else layer.processor.density(Sequence(_square(tokens)))

    return Side(method, _typed(options), attn_plugins.__version__, apply)


def tomesd(name: str, latents: int, ratio: float = 0.5, max_downsample: int = 1) -> Side:
    """Token merging, as published and where it reaches further down. Merged tokens need no projections either."""

    @contextmanager
    def apply(unet: Any) -> Iterator[Cost]:
        import tomesd

        tomesd.apply_patch(unet, ratio=ratio, max_downsample=max_downsample)
        try:
            yield lambda tokens: (1 - ratio) ** 2 if tokens * max_downsample**2 >= latents**2 else 1.0
        finally:
            tomesd.remove_patch(unet)
            for module in unet.modules():  # what it leaves behind
                module.__dict__.pop("_tome_info", None)

    return Side(name, f"ratio={ratio} max_downsample={max_downsample}", _version("tomesd"), apply)


class ToDoProcessor:
    """ToDo (2402.13573): keys and values are projected from every `factor`-th token, by nearest-exact; queries stay."""

    def __init__(self, inner: Any, factor: int, least: int) -> None:
        self.inner, self.factor, self.least = inner, factor, least

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any = None, **options: Any
    ) -> Any:
        few = encoder_hidden_states
        if hidden_states.shape[1] >= self.least:
            image = hidden_states.transpose(1, 2).unflatten(2, _square(hidden_states.shape[1]))
            few = F.interpolate(image, scale_factor=1 / self.factor, mode="nearest-exact").flatten(2).transpose(1, 2)
        return self.inner(attn, hidden_states, few, **options)


def todo(least: int, factor: int = 2) -> Side:
    @contextmanager
    def apply(unet: Any) -> Iterator[Cost]:
        own = unet.attn_processors
        unet.set_attn_processor(
            {name: ToDoProcessor(one, factor, least) if ".attn1." in name else one for name, one in own.items()}
        )
        try:
            yield lambda tokens: factor**-2 if tokens >= least else 1.0
        finally:
            unet.set_attn_processor(own)

    return Side("todo", f"factor={factor}", "by 2402.13573", apply)


def all_sides(latents: int, least: int) -> tuple[Side, ...]:
    """For square latents; ToDo keeps off the levels that the library's methods leave dense."""
    return (
        Side("dense", "", torch.__version__, dense),
        library("agent", ratio=1 / 16),
        library("kv_pool", factor=2),
        tomesd("tomesd", latents),
        tomesd("tomesd_deeper", latents, max_downsample=2),
        todo(least),
    )


def _square(tokens: int) -> tuple[int, int]:
    return math.isqrt(tokens), math.isqrt(tokens)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _typed(options: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items())
