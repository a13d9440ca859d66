"""Causal language models of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from attn_plugins.patches.attention_interface import AttentionInterfaceSwap
from attn_plugins.patches.family import Family
from attn_plugins.sequence import Sequence


def text(root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Sequence | str:
    """One axis: the tokens so far, those in the cache included."""
    tokens = kwargs.get("input_ids", args[0] if args else None)
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    if tokens is None:
        return "neither input_ids nor inputs_embeds was given"
    length = tokens.shape[1]
    cache = kwargs.get("past_key_values")
    held = cache.get_seq_length() if cache is not None else 0
    return Sequence((length + held if isinstance(held, int) else length,))


def _family(name: str, title: str, base: str, notes: str = "") -> Family:
    return Family(
        name=name,
        title=title,
        library="transformers",
        classes=(base,),
        sites=((r"(.*\.)?layers\.\d+\.self_attn", "causal"),),
        read=text,
        interception=AttentionInterfaceSwap(),
        notes=notes,
    )


FAMILIES = (
    _family("llama", "Llama 1-3", "LlamaPreTrainedModel"),
    _family("qwen2", "Qwen 2 / 2.5", "Qwen2PreTrainedModel"),
    _family("qwen3", "Qwen 3", "Qwen3PreTrainedModel"),
    _family(
        "mistral", "Mistral", "MistralPreTrainedModel", "Its own sliding window still holds: the smaller one counts."
    ),
    _family(
        "phi3", "Phi-3 / Phi-4", "Phi3PreTrainedModel", "Its own sliding window still holds: the smaller one counts."
    ),
)
