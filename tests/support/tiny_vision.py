"""Random-weight vision transformers, pictures for them, and what a window over their patches is, by definition."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.support.tiny import randn

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 32,
    "patch_size": 8, "initializer_range": 0.3,
}  # fmt: skip
_CUBES = {"frames": 4, "strides": (2, 8, 8)}


@dataclass(frozen=True)
class TinyVision:
    """A row: X of XConfig, what it needs beside `SIZES`, the model's class if it is not XModel, how many tokens of its
    own come first, what it is told of a picture of another size (None: it takes one), what else its forward is given.
    """

    config: str
    options: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    before: int = 0
    resized: dict[str, Any] | None = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    frames: int = 0
    strides: tuple[int, ...] = (8, 8)


_RESIZED = {"interpolate_pos_encoding": True}
MODELS = {
    "ViT": TinyVision("ViT", before=1, resized=_RESIZED),
    "ViT classifier": TinyVision("ViT", model="ViTForImageClassification", before=1, resized=_RESIZED),
    "I-JEPA": TinyVision("IJepa", resized=_RESIZED),
    "MSN": TinyVision("ViTMSN", before=1, resized=_RESIZED),
    "DeiT": TinyVision("DeiT", before=2, resized=_RESIZED),
    "DINOv2": TinyVision("Dinov2", before=1),
    "DINOv2 with registers": TinyVision("Dinov2WithRegisters", {"num_register_tokens": 3}, before=4),
    "DINOv3": TinyVision("DINOv3ViT", {"num_register_tokens": 4}, before=5),
    "CLIP": TinyVision("CLIPVision", before=1, resized=_RESIZED),
    "CLIP projected": TinyVision("CLIPVision", model="CLIPVisionModelWithProjection", before=1, resized=_RESIZED),
    "MLCD": TinyVision("MLCDVision", before=1),
    "SigLIP": TinyVision("SiglipVision", resized=_RESIZED),
    "SigLIP 2": TinyVision("Siglip2Vision", {"num_patches": 16}),
    "AIMv2": TinyVision("Aimv2Vision", {"is_native": True}),
    "InternViT": TinyVision("InternVLVision", {"image_size": [32, 32], "patch_size": [8, 8]}, before=1),
    "Depth Anything": TinyVision("DepthAnything", model="DepthAnythingForDepthEstimation", before=1),
    "ViViT": TinyVision("Vivit", {"num_frames": 4, "tubelet_size": [2, 8, 8]}, before=1, resized=None, **_CUBES),
    "VideoMAE": TinyVision("VideoMAE", {"num_frames": 4}, resized=None, **_CUBES),
    "V-JEPA 2": TinyVision(
        "VJEPA2",
        {"frames_per_clip": 4, "crop_size": 32, "pred_hidden_size": 32, "pred_num_attention_heads": 2},
        given={"skip_predictor": True},
        **_CUBES,
    ),
    "Qwen2-VL": TinyVision(
        "Qwen2VLVision",
        {"depth": 2, "embed_dim": 32, "num_heads": 2},
        model="Qwen2VisionTransformerPretrainedModel",
    ),
    "Qwen3-VL": TinyVision(
        "Qwen3VLVision",
        {"depth": 2, "num_heads": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        model="Qwen3VLVisionModel",
    ),
}  # fmt: skip


def build(name: str) -> Any:
    """The model, in eval mode."""
    import transformers

    row = MODELS[name]
    torch.manual_seed(0)
    options = {**SIZES, **row.options}
    if name == "Depth Anything":
        backbone = transformers.Dinov2Config(**SIZES, out_indices=[1, 2], reshape_hidden_states=False)
        options = {
            "backbone_config": backbone, "patch_size": 8, "reassemble_hidden_size": 32, "reassemble_factors": [2, 1],
            "neck_hidden_sizes": [8, 8], "fusion_hidden_size": 8, "head_hidden_size": 8,
        }  # fmt: skip
    config = getattr(transformers, f"{row.config}Config")(**options)
    cls = _find(row.model or f"{row.config}Model")
    model = cls(config).eval()
    for parameter in model.parameters():  # some initialise to nearly nothing whatever they are told
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model


def _find(name: str) -> Any:
    import transformers
    from transformers.models.qwen2_vl import modeling_qwen2_vl

    return getattr(transformers, name, None) or getattr(modeling_qwen2_vl, name)


def grid(name: str, size: int) -> tuple[int, ...]:
    """The patches of picture size 0 or 1; a model of one size has the same twice."""
    row = MODELS[name]
    height = 48 if size and row.resized is not None else 32
    sizes = (row.frames, height, 32) if row.frames else (height, 32)
    return tuple(length // stride for length, stride in zip(sizes, row.strides, strict=True))


def inputs(name: str, batch: int, size: int = 0) -> dict[str, Any]:
    """Keyword arguments of the model's forward."""
    row = MODELS[name]
    cells = grid(name, size)
    if name.startswith("Qwen"):
        tokens = batch * cells[0] * cells[1]
        pixels = torch.cat([randn(tokens // batch, 3 * 2 * 8 * 8, seed=item) for item in range(batch)])
        return {"hidden_states": pixels, "grid_thw": torch.tensor([[1, *cells]] * batch)}
    if name == "SigLIP 2":  # with three places of padding
        real = cells[0] * cells[1]
        mask = (torch.arange(real + 3) < real).long().expand(batch, -1)
        pixels = torch.stack([randn(real + 3, 3 * 8 * 8, seed=item) for item in range(batch)])
        shapes = torch.tensor([cells] * batch)
        return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    height, width = cells[-2] * 8, cells[-1] * 8
    shape = (row.frames, 3, height, width) if row.frames else (3, height, width)
    pixels = torch.stack([randn(*shape, seed=item) for item in range(batch)])
    named = "pixel_values_videos" if row.config == "VJEPA2" else "pixel_values"
    return {named: pixels, **row.given, **((row.resized or {}) if size else {})}


def item(given: dict[str, Any], index: int) -> dict[str, Any]:
    """One picture of two."""
    return {key: value.chunk(2)[index] if isinstance(value, torch.Tensor) else value for key, value in given.items()}


@torch.no_grad()
def features(name: str, model: Any, given: dict[str, Any]) -> torch.Tensor:
    """What the model says of its patches, padding left out; of a batch in one row of tokens (Qwen-VL) too."""
    out = model(**given)[0]
    if name == "SigLIP 2":
        height, width = given["spatial_shapes"][0].tolist()
        out = out[:, : height * width]
    return out


def visible(name: str, size: int, window: int) -> torch.Tensor:
    """(N, N) bool, one pair at a time, in the order in which the model has its tokens."""
    cells = grid(name, size)
    places = list(itertools.product(*map(range, cells)))
    if name.startswith("Qwen"):  # 2 x 2 cells, one after the other
        places.sort(key=lambda place: (place[0] // 2, place[1] // 2, place))
    before, after = MODELS[name].before, 3 if name == "SigLIP 2" else 0

    def sees(query: tuple[int, ...], key: tuple[int, ...]) -> bool:
        for x, y, length in zip(query, key, cells, strict=True):
            first = min(max(x - window // 2, 0), max(length - window, 0))
            if not first <= y < first + window:
                return False
        return True

    seen = torch.ones(before + len(places) + after, before + len(places) + after, dtype=torch.bool)
    for i, query in enumerate(places):
        for j, key in enumerate(places):
            seen[before + i, before + j] = sees(query, key)
    seen[:, before + len(places) :] = False
    return seen


@contextlib.contextmanager
def masked(model: Any, mask: torch.Tensor) -> Iterator[None]:
    """Every self-attention of an unpatched model under this mask, whatever mask it is given."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def forward(module: Any, q: Any, k: Any, v: Any, attention_mask: Any, **more: Any) -> Any:
        here = mask if q.shape[2] == mask.shape[0] else None  # else an attention that is no site (a pooling head)
        return sdpa_attention_forward(module, q, k, v, here, **more)

    before = {
        part: part.config._attn_implementation for part in model.modules() if hasattr(part, "set_attn_implementation")
    }
    AttentionInterface.register("by_definition", forward)
    model.set_attn_implementation("by_definition")
    try:
        yield
    finally:
        for part, name in before.items():
            part.set_attn_implementation(name)
        AttentionInterface._global_mapping.pop("by_definition")
