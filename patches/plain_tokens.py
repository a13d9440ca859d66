"""Queries and keys of a diffusers layer from before norm and rotation: pooled, then normed and rotated like its own.

Means of rotated vectors lose what turns fast, and means of normed ones are no longer normed. What enters a layer's
`norm_q` and `norm_k` is caught there; the tables of rotation are an argument of its processor, and their rows at the
middle of a cell are made of the rows of its middle tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from attn_plugins.method import AttentionCall
from attn_plugins.ops.agent import pool_tokens
from attn_plugins.sequence import Sequence

Form = Literal["none", "pairs", "halves", "complex"]
# How processors rotate what they have normed: the argument that holds the tables, and what is turned together, channels
# 2i and 2i + 1 ("pairs" by cos and sin, "complex" by complex numbers) or i and i + D / 2 ("halves", by cos and sin).
# Layers of other classes pool what arrives, after norm and rotation. LTX is left out: some of its channels turn around
# many times from one token to the next, so that no middle can be told. tests/patches/test_plain_tokens.py holds each
# class to what it does.
_CLASSES: dict[tuple[str, Form], str] = {
    ("", "none"): """AttnProcessor2_0 FusedAttnProcessor2_0 JointAttnProcessor2_0 SD3IPAdapterJointAttnProcessor2_0
        AuraFlowAttnProcessor2_0 FusedAuraFlowAttnProcessor2_0 DreamLiteAttnProcessor2_0""",
    ("image_rotary_emb", "pairs"): """FluxAttnProcessor FluxIPAdapterAttnProcessor Flux2AttnProcessor
        Flux2KVAttnProcessor Flux2ParallelSelfAttnProcessor Flux2KVParallelSelfAttnProcessor Flux3AttnProcessor
        BriaAttnProcessor BriaFiboAttnProcessor OvisImageAttnProcessor LongCatImageAttnProcessor Krea2AttnProcessor
        HunyuanAttnProcessor2_0 FusedHunyuanAttnProcessor2_0 HunyuanVideoAttnProcessor2_0 HunyuanImageAttnProcessor
        HunyuanVideo15AttnProcessor2_0 CogVideoXAttnProcessor2_0 FusedCogVideoXAttnProcessor2_0
        EasyAnimateAttnProcessor2_0 MotifVideoAttnProcessor2_0""",
    ("rotary_emb", "pairs"): "WanAttnProcessor SkyReelsV2AttnProcessor",
    ("image_rotary_emb", "halves"): """CosmosAttnProcessor2_0 CosmosAttnProcessor2_5 CogView4AttnProcessor
        GlmImageAttnProcessor Ideogram4AttnProcessor""",
    ("image_rotary_emb", "complex"): """QwenDoubleStreamAttnProcessor2_0 NucleusMoEAttnProcessor2_0
        Lumina2AttnProcessor2_0""",
    ("rotary_emb", "complex"): "QwenImage21AttnProcessor",
    ("query_rotary_emb", "complex"): "LuminaAttnProcessor2_0",
    ("freqs_cis", "complex"): "ZSingleStreamAttnProcessor BriaFibo2AttnProcessor",
}
ROTATIONS = {name: row for row, names in _CLASSES.items() for name in names.split()}


@dataclass(frozen=True)
class Rotation:
    """How processors of one class rotate, and where their tables stand among their arguments."""

    form: Form
    argument: str
    position: int

    def tables(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.argument in kwargs or not 0 <= self.position < len(args):
            return kwargs.get(self.argument)
        return args[self.position]


def rotation_of(cls: type, call: Callable[..., Any]) -> Rotation | None:
    """How processors of class `cls`, whose call is `call`, rotate; None where that is not known."""
    if not cls.__module__.startswith("diffusers.") or cls.__name__ not in ROTATIONS:
        return None
    argument, form = ROTATIONS[cls.__name__]
    names = list(inspect.signature(call).parameters)[2:]  # without the processor and the module
    return Rotation(form, argument, names.index(argument) if argument in names else -1)


@dataclass
class PlainTokens:
    """What one running layer was given and has caught; see `method.AttentionCall.plain`."""

    rotation: Rotation
    tables: Any
    found: dict[str, tuple[nn.Module, torch.Tensor]] = field(default_factory=dict)

    def pooled(self, which: Literal["q", "k"], call: AttentionCall, to: tuple[int, ...]) -> torch.Tensor | None:
        """(B, H, prod(to), D), normed and rotated at the middle of their cells, or None: it cannot be told."""
        sequence = call.sequence
        if sequence is None or which not in self.found:
            return None
        like = call.q if which == "q" else call.k
        heads, dim = like.shape[1], like.shape[3]
        norm, x = self.found[which]
        if x.ndim == 4 and x.shape[1] == x.shape[2]:  # as many tokens as heads: which are which cannot be told
            return None
        if x.ndim == 4 and x.shape[2] == heads:
            x = x.transpose(1, 2)
        elif x.shape[1:] == (x.shape[1], heads * dim):
            x = x[:, None]
        first = first_of_grid(x.shape[-2], sequence)
        if first is None or x.ndim != 4 or x.shape[1] not in (1, heads) or x.shape[0] != like.shape[0]:
            return None
        means = norm.forward(pool_tokens(x, sequence.grid, to, first))  # not a call: the hook on it would catch this
        if means.shape[1] != heads:  # normed over all heads at once
            means = means[:, 0].unflatten(-1, (heads, dim)).transpose(1, 2)
        if self.rotation.form != "none" and self.tables is not None:
            turned = rotated(means, self.tables, self.rotation.form, sequence, to)
            if turned is None:
                return None
            means = turned
        return means.to(like.dtype)


def first_of_grid(rows: int, sequence: Sequence) -> int | None:
    """Where the grid begins in a stream of `rows` tokens: the grid alone, or with what follows it, or all of them."""
    if rows in (sequence.tokens, sequence.tokens + sequence.text_after):
        return 0
    return sequence.text_before if rows == sequence.length else None


def rotated(x: torch.Tensor, tables: Any, form: Form, sequence: Sequence, to: tuple[int, ...]) -> torch.Tensor | None:
    """Rotate (B, H, prod(to), D), one token a cell, by the angles at the middle of the cells; None: unknown tables."""
    if form == "complex" and isinstance(tables, tuple):  # of the picture, and of text
        tables = tables[:1]
    parts = tables if isinstance(tables, (tuple, list)) else (tables,)
    if len(parts) != (1 if form == "complex" else 2) or not all(isinstance(part, torch.Tensor) for part in parts):
        return None
    turns = []
    for part in parts:
        turn = at_centres(part, sequence, to, x.shape[1], x.shape[3])
        if turn is None:
            return None
        turns.append(turn)
    wide = x.float()
    if form == "complex":
        turned = torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous()) * (turns[0] / turns[0].abs())
        return torch.view_as_real(turned).flatten(-2)
    cos, sin = turns
    length = torch.sqrt(cos * cos + sin * sin)
    if form == "pairs":
        real, imaginary = wide.unflatten(-1, (-1, 2)).unbind(-1)
        across = torch.stack((-imaginary, real), dim=-1).flatten(-2)
    else:
        real, imaginary = wide.chunk(2, dim=-1)
        across = torch.cat((-imaginary, real), dim=-1)
    return wide * (cos / length) + across * (sin / length)


def at_centres(
    table: torch.Tensor, sequence: Sequence, to: tuple[int, ...], heads: int, dim: int
) -> torch.Tensor | None:
    """The mean of a table's rows at the middle token of each cell, or its two middle tokens: of cos and sin it points
    where the middle between them does, if neighbours are less than half a turn apart. (B or 1, H or 1, prod(to), C).

    Tables are (N, C), (B, N, C), (B, N, H * D), (B, N, 1, C) or (B, 1, N, C), with the grid's rows or the sequence's.
    """
    if table.ndim == 2:
        table = table[None, None]
    elif table.ndim == 3 and heads > 1 and table.shape[2] == heads * dim:
        table = table.unflatten(2, (heads, dim)).transpose(1, 2)
    elif table.ndim == 3:
        table = table[:, None]
    elif table.ndim == 4 and first_of_grid(table.shape[2], sequence) is None:
        table = table.transpose(1, 2)
    first = first_of_grid(table.shape[2], sequence) if table.ndim == 4 else None
    if first is None or table.shape[3] != (dim // 2 if table.is_complex() else dim):
        return None
    rows = table[:, :, first : first + sequence.tokens].unflatten(2, sequence.grid)
    rows = rows if rows.is_complex() else rows.float()
    for axis, (many, few) in enumerate(zip(sequence.grid, to, strict=True), start=2):
        cell = torch.arange(few, device=rows.device)
        ends = cell * many // few - ((cell + 1) * many // -few)  # the sum of where a cell begins and ends
        rows = (rows.index_select(axis, (ends - 1) // 2) + rows.index_select(axis, ends // 2)) / 2
    return rows.flatten(2, -2)
