"""Causal language models of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from attn_plugins.patches.attention_interface import AttentionInterfaceSwap
from attn_plugins.patches.family import Family
from attn_plugins.patches.shapes import of_attention
from attn_plugins.sequence import Sequence

_SITES = r"(?!.*vis(ion|ual))(.*\.)?layers\.\d+\.(self_attn|attention)"
_SLIDING = "Its own sliding window still holds: the smaller one counts."


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


def language_family(name: str, title: str, *bases: str, notes: str = "", sites: str = _SITES) -> Family:
    """A row: one causal self-attention per layer, through transformers' AttentionInterface.

    `bases`: X of XPreTrainedModel, the class that all models of a kind derive from.
    """
    return Family(
        name=name,
        title=title,
        library="transformers",
        classes=tuple(f"{base}PreTrainedModel" for base in bases),
        sites=((sites, "causal"),),
        read=text,
        interception=AttentionInterfaceSwap(),
        notes=notes,
        shape=of_attention,
    )


FAMILIES = (
    language_family("llama", "Llama 1-3", "Llama"),
    language_family("qwen2", "Qwen 2 / 2.5", "Qwen2"),
    language_family("qwen2_moe", "Qwen 1.5 / 2 MoE", "Qwen2Moe"),
    language_family("qwen3", "Qwen 3", "Qwen3"),
    language_family("qwen3_moe", "Qwen 3 MoE", "Qwen3Moe"),
    language_family("mistral", "Mistral", "Mistral", notes=_SLIDING),
    language_family("ministral", "Ministral / Mistral Small 3", "Ministral", "Ministral3", notes=_SLIDING),
    language_family("mixtral", "Mixtral", "Mixtral", notes=_SLIDING),
    language_family("gemma", "Gemma 1", "Gemma"),
    language_family("gemma2", "Gemma 2", "Gemma2", notes=f"{_SLIDING} Capped scores are honoured."),
    language_family(
        "gemma3", "Gemma 3", "Gemma3", notes=f"{_SLIDING} Prompts whose pictures see both ways stay dense."
    ),
    language_family("phi", "Phi 1 / 2", "Phi"),
    language_family("phi3", "Phi-3 / Phi-4", "Phi3", notes=_SLIDING),
    language_family("gpt_oss", "GPT-OSS", "GptOss", notes=f"{_SLIDING} Learned sinks are honoured."),
    language_family("gpt_neox", "GPT-NeoX, Pythia", "GPTNeoX"),
    language_family("opt", "OPT", "OPT"),
    language_family("stablelm", "StableLM", "StableLm"),
    language_family("starcoder2", "StarCoder 2", "Starcoder2", notes=_SLIDING),
    language_family("cohere", "Command R", "Cohere"),
    language_family("cohere2", "Command R7B / A", "Cohere2", notes=_SLIDING),
    language_family("olmo", "OLMo 1 / 2", "Olmo", "Olmo2"),
    language_family("olmo3", "OLMo 3", "Olmo3", notes=_SLIDING),
    language_family("glm", "GLM 4", "Glm", "Glm4", "Glm4Moe"),
    language_family("smollm3", "SmolLM3", "SmolLM3"),
    language_family("granite", "Granite 3", "Granite", "GraniteMoe"),
    language_family("exaone4", "EXAONE 4", "Exaone4", notes=_SLIDING),
    language_family("ernie4_5", "ERNIE 4.5", "Ernie4_5"),
    language_family("helium", "Helium", "Helium"),
    language_family("hunyuan_dense", "Hunyuan (dense)", "HunYuanDenseV1"),
    language_family("seed_oss", "Seed-OSS", "SeedOss"),
    language_family("apertus", "Apertus", "Apertus"),
    language_family("nemotron", "Nemotron 3 / 4", "Nemotron"),
)
