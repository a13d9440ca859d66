"""Phrases as a pipeline's own text encoders see them, each alone, and their keys in each layer."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from attn_plugins.patches.prompts import check_encodes, encode_prompts


class Phrases:
    """Rows of R phrases, shared by all layers of a patch.

    Attributes:
        names: the phrases.
        rows: (1 or B, R, L, C), the tokens' encodings without that of the begin token.
        lengths: (1 or B, R) int64: how many of the L rows are the phrase's.
    """

    def __init__(self, names: tuple[str, ...], rows: torch.Tensor, lengths: torch.Tensor) -> None:
        self.names = names
        self.rows = rows
        self.lengths = lengths

    def set(self, rows: torch.Tensor, lengths: torch.Tensor) -> None:
        """Other phrases for the same references, (1 or B, R, L, C) and (1 or B, R): in training, those of each item."""
        if rows.ndim != 4 or lengths.shape != rows.shape[:2] or rows.shape[1] != len(self.names):
            raise ValueError(
                f"rows {tuple(rows.shape)}, lengths {tuple(lengths.shape)}: give (1 or B, {len(self.names)}, L, C) and "
                f"(1 or B, {len(self.names)})"
            )
        self.rows, self.lengths = rows, lengths

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move to where the model runs now; nothing if they are there."""
        if self.rows.device != device or self.rows.dtype != dtype:
            self.rows = self.rows.to(device, dtype)
        if self.lengths.device != device:
            self.lengths = self.lengths.to(device)


def encode(pipe: Any, names: Sequence[str]) -> Phrases:
    """Encode phrases by `pipe.encode_prompt`, each alone.

    Raises:
        ValueError: no pipeline or text encoder, an empty phrase, or one that is longer than the encoder takes.
    """
    check_encodes(pipe, "phrases", names)
    tokenizer = getattr(pipe, "tokenizer", None) or pipe.tokenizer_2
    counts = [_count(pipe, tokenizer, name) for name in names]
    rows = encode_prompts(pipe, names)[:, 1 : 1 + max(counts)].clone()
    return Phrases(tuple(names), rows[None], torch.tensor([counts], device=rows.device))


def _count(pipe: Any, tokenizer: Any, name: str) -> int:
    """Tokens of a phrase, without those of begin and end."""
    convert = getattr(pipe, "maybe_convert_prompt", None)  # textual inversion: one word may be many tokens
    text = convert(name, tokenizer) if callable(convert) else name
    ids = tokenizer(text, truncation=False, verbose=False).input_ids
    begins = bool(ids) and ids[0] == tokenizer.bos_token_id
    ends = bool(ids) and ids[-1] == tokenizer.eos_token_id
    if not (begins and ends):
        raise ValueError(
            f"{type(tokenizer).__name__} puts no begin and end token around a phrase, as CLIP's does: not known"
        )
    count = len(ids) - 2
    if count < 1:
        raise ValueError(f"phrase {name!r} is empty: it has no tokens")
    if len(ids) > tokenizer.model_max_length:
        raise ValueError(
            f"phrase {name!r} has {count} tokens, the text encoder takes {tokenizer.model_max_length - 2}: shorten it "
            "to the words of the prompt that name the object"
        )
    return count


class LayerPhrases:
    """The phrases of a patch in one layer: their keys, kept over the steps, and the layer's `text_to_weight`."""

    def __init__(self, phrases: Phrases, text_weight: torch.Tensor | None) -> None:
        self.phrases = phrases
        self.text_weight = text_weight
        self._kept: tuple[list[Any], list[weakref.ref[torch.Tensor]], torch.Tensor] | None = None

    def keys(self, attn: Any) -> torch.Tensor:
        """(1 or B, R, H, L, D), by the layer's own text projection. No gradient runs through them.

        Kept as long as the phrases and all that the projection is made of are the same; compiled code makes them anew.
        """
        if torch.compiler.is_compiling():
            return self._project(attn)
        told, tensors = _state(attn.to_k)
        tensors.append(self.phrases.rows)
        told += [id(t) for t in tensors]
        kept = self._kept
        if kept is None or kept[0] != told or any(ref() is None for ref in kept[1]):  # an id may be used again
            kept = self._kept = told, [weakref.ref(t) for t in tensors], self._project(attn)
        return kept[2]

    def _project(self, attn: Any) -> torch.Tensor:
        with torch.no_grad():
            rows = self.phrases.rows
            if attn.norm_cross:
                rows = attn.norm_encoder_hidden_states(rows.flatten(0, 1)).view_as(rows)
            return attn.to_k(rows).unflatten(-1, (attn.heads, -1)).transpose(2, 3)

    def weight(self, device: torch.device) -> torch.Tensor | None:
        """`text_to_weight` (H * D,) on a device."""
        if self.text_weight is not None and self.text_weight.device != device:
            self.text_weight = self.text_weight.to(device)
        return self.text_weight

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}  # weak references are neither copied nor pickled


def _state(projection: nn.Module) -> tuple[list[Any], list[torch.Tensor]]:
    """What tells whether anybody has trained or loaded any of a projection, and the tensors that it is made of.

    With the strengths of LoRA layers, which PEFT keeps as plain numbers.
    """
    told: list[Any] = []
    tensors: list[torch.Tensor] = []
    for module in projection.modules():
        here = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        tensors += here
        told += [0 if t.is_inference() else t._version for t in here]
        for name in ("scaling", "active_adapters", "merged_adapters", "disable_adapters"):
            value = getattr(module, name, None)
            told.append(dict(value) if isinstance(value, dict) else str(value))
    return told, tensors
