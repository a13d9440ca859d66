"""Vision transformers of transformers, also as towers of larger models: a grid of patches, its own tokens before it.

Swin, its kin and SAM have windows of their own, and no attention over the whole picture to make sparse; BEiT and
Data2Vec add a position bias to every score.
"""

from __future__ import annotations

from typing import Any

from attn_plugins.patches.attention_interface import AttentionInterfaceSwap
from attn_plugins.patches.family import Family
from attn_plugins.patches.grids import vision
from attn_plugins.patches.shapes import of_attention

_NOT_VISION = r"(?!.*(text|decoder|predictor))"
_SITES = _NOT_VISION + r"(.*\.)?layers?\.\d+\.(self_attn|attention)"
_PATCHES = {"levels": {_NOT_VISION + r"(.*\.)?embeddings": vision.patches}}


def vision_family(name: str, title: str, *classes: str, sites: str = _SITES, notes: str = "", **more: Any) -> Family:
    """A row: one self-attention per layer over all patches, through transformers' AttentionInterface."""
    return Family(
        name=name,
        title=title,
        library="transformers",
        classes=classes,
        sites=((sites, "self"),),
        read=more.pop("read", vision.by_entry),
        interception=AttentionInterfaceSwap(),
        notes=notes,
        shape=more.get("shape", vision.shape),
        sized="shape" not in more,
        extras=more.pop("extras", _PATCHES),
    )


def _of(*kinds: str) -> tuple[str, ...]:
    return tuple(f"{kind}PreTrainedModel" for kind in kinds)


def _dual(kind: str) -> tuple[str, ...]:
    """The classes of a text-and-picture model that hold its vision transformer."""
    heads = ("VisionModel", "VisionModelWithProjection", "VisionTransformer", "Model", "ForImageClassification")
    return tuple(kind + head for head in heads)


FAMILIES = (
    vision_family(
        "vit",
        "ViT, I-JEPA, MSN",
        *_of("ViT", "IJepa", "ViTMSN"),
    ),
    vision_family("deit", "DeiT", *_of("DeiT")),
    vision_family("dinov2", "DINOv2, with registers too", *_of("Dinov2", "Dinov2WithRegisters")),
    vision_family("dinov3", "DINOv3 (ViT)", *_of("DINOv3ViT")),
    vision_family("clip_vision", "CLIP vision", *_dual("CLIP"), *_of("MLCD")),
    vision_family("siglip_vision", "SigLIP vision", *_dual("Siglip")),
    vision_family(
        "siglip2_vision",
        "SigLIP 2 vision (any size)",
        *_dual("Siglip2"),
        notes="Batches of pictures of different sizes stay dense.",
        shape=of_attention,
        extras={"levels": {r"|(.*\.)?vision_model": vision.spatial_shapes}, "key_padding": True},
    ),
    vision_family("aimv2_vision", "AIMv2 vision", *_dual("Aimv2")),
    vision_family("internvl_vision", "InternViT", *_of("InternVLVision")),
    vision_family("depth_anything", "Depth Anything", *_of("DepthAnything")),
    vision_family("vivit", "ViViT", *_of("Vivit")),
    vision_family("videomae", "VideoMAE", *_of("VideoMAE"), sites=r"(.*\.)?encoder\.layer\.\d+\.attention\.attention"),
    vision_family("vjepa2", "V-JEPA 2 (encoder)", *_of("VJEPA2")),
    vision_family(
        "qwen_vl_vision",
        "Qwen2-VL / Qwen3-VL vision",
        "Qwen2VisionTransformerPretrainedModel",
        "Qwen3VLVisionModel",
        "Qwen3VLMoeVisionModel",
        sites=r"blocks\.\d+\.attn",
        read=vision.frames,
        notes="Frame by frame; calls with pictures of different sizes stay dense.",
        shape=None,
        extras={"cells": "spatial_merge_size"},
    ),
)
