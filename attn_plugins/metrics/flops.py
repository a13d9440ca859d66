"""Floating-point operations of one forward, estimated from shapes: attention, and the linear layers beside it.

The estimate needs no forward. It assumes that in each block with a patched site every `nn.Linear` runs once on the
tokens of its stream (text linears of a joint block on the text, the others of it on the grid), and leaves out what runs
on few tokens: modulation, embedders, the keys and values and the scores of cross-attention.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from attn_plugins.sequence import Sequence

_FEW_TOKENS = re.compile(r"(^|\.)(norm|adaln|mod|time|img_mod|txt_mod)", re.IGNORECASE)
_TEXT_STREAM = re.compile(r"(^|\.|_)(add|context|txt|text)(_|\.|$)")
_KEYS_VALUES = re.compile(r"\.(to_k|to_v|k_proj|v_proj|add_k_proj|add_v_proj)$")
_QUERY = ("to_q", "q_proj", "query", "q")


@dataclass(frozen=True)
class StepFlops:
    """Per batch item. `attention`: of each grid site by name, dense. `linear`: of the blocks around them.

    `linear` is None where the model is not made of linear layers alone (a UNet): then no share can be told from shapes.
    """

    attention: dict[str, float]
    linear: float | None

    @property
    def share(self) -> float | None:
        """Attention's share of attention and linear FLOPs."""
        if self.linear is None or not self.attention:
            return None
        total = sum(self.attention.values())
        return total / (total + self.linear)


def step_flops(root: nn.Module, sites: Iterable[tuple[str, str]], sequence: Sequence) -> StepFlops:
    """Estimate a forward of `root` on one item of `sequence`.

    Args:
        sites: (module name, kind) of every attention module, patched or not; kind as in `method.SiteKind`.
    """
    sites = list(sites)
    attention: dict[str, float] = {}
    blocks: dict[str, None] = {}
    for name, kind in sites:
        width = _query_width(root.get_submodule(name))
        if kind != "cross" and width is not None:
            # One multiply-add of q with k and one of the weights with v, per pair and channel.
            attention[name] = 4.0 * _tokens(kind, sequence) ** 2 * width
        blocks[_block(root, name)] = None
    cross = tuple(f"{name}." for name, kind in sites if kind == "cross")
    linear = None if _has_convolutions(root) else sum(_block_linears(root, block, cross, sequence) for block in blocks)
    return StepFlops(attention, linear)


def _tokens(kind: str, sequence: Sequence) -> int:
    return sequence.tokens if kind == "self" else sequence.length


def _query_width(module: nn.Module) -> int | None:
    """Heads times head dimension."""
    for name in _QUERY:
        width = getattr(getattr(module, name, None), "out_features", None)
        if isinstance(width, int):
            return width
    width = getattr(module, "inner_dim", None)
    return width if isinstance(width, int) else None


def _block(root: nn.Module, site: str) -> str:
    """The innermost item of a ModuleList that holds the site; else the site itself."""
    parts = site.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if isinstance(root.get_submodule(".".join(parts[: end - 1])), nn.ModuleList):
            return ".".join(parts[:end])
    return site


def _block_linears(root: nn.Module, block: str, cross: tuple[str, ...], sequence: Sequence) -> float:
    names = {
        name: module.in_features * module.out_features
        for name, module in root.get_submodule(block).named_modules()
        if isinstance(module, nn.Linear) and not _FEW_TOKENS.search(name)
    }
    two_streams = any(_TEXT_STREAM.search(name) for name in names)
    total = 0.0
    for name, weights in names.items():
        full = f"{block}.{name}"
        if full.startswith(cross) and _KEYS_VALUES.search(full):
            continue
        if two_streams:
            of_text = _TEXT_STREAM.search(name) is not None
            tokens = sequence.length - sequence.tokens if of_text else sequence.tokens
        else:
            tokens = sequence.length
        total += 2.0 * weights * tokens
    return total


def _has_convolutions(root: nn.Module) -> bool:
    """Whether there are convolutions other than patch embeddings (whose kernel is their stride)."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return any(isinstance(module, kinds) and module.kernel_size != module.stride for module in root.modules())
