"""Language models that see. `patch(model)` takes the language model: causal windows over text and picture tokens alike.

The vision tower is a model of its own, to be patched by itself (`patch(model.model.vision_tower, ...)`, or
`model.model.visual`) where `vision.py` has a row for it. Either is undone without the other.
"""

from __future__ import annotations

from attn_plugins.patches.families.language import language_family

_SITES = r"((model|language_model|text_model)\.)*layers\.\d+\.self_attn"

FAMILIES = (
    language_family(
        "llava",
        "LLaVA, -NeXT, -OneVision, VipLLaVA, Mistral 3, Aya Vision",
        *("Llava", "LlavaNext", "LlavaOnevision", "VipLlava", "Mistral3", "AyaVision"),
        sites=_SITES,
        notes="The language model; patch its vision tower by itself.",
    ),
    language_family(
        "internvl",
        "InternVL 3",
        "InternVL",
        sites=_SITES,
        notes="The language model; patch its vision tower by itself.",
    ),
    language_family(
        "idefics3", "Idefics 3, SmolVLM", "Idefics3", "SmolVLM", sites=_SITES, notes="The language model alone."
    ),
    language_family(
        "qwen_vl",
        "Qwen2-VL, Qwen2.5-VL, Qwen3-VL",
        *("Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Qwen3VLMoe"),
        sites=_SITES,
        notes="The language model; patch `visual` by itself (2.5's has windows of its own, and is none of ours).",
    ),
)
