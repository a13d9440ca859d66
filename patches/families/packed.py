"""Image transformers of diffusers that get packed tokens: FLUX, Qwen-Image and their kin."""

from attn_plugins.patches.adapter_flux import FluxReferences
from attn_plugins.patches.diffusers_family import diffusers_family
from attn_plugins.patches.family import SitePattern
from attn_plugins.patches.grids import packed
from attn_plugins.patches.longer_text import LongerText

_BOTH: tuple[SitePattern, ...] = ((r"(single_)?transformer_blocks\.\d+\.attn", "joint"),)
_REFERENCES = "Reference pictures are dense, the picture that is made is sparse."
_PADDED = "Padded prompts are shorter text, per item."

FAMILIES = (
    diffusers_family(
        "flux",
        "FLUX.1",
        "FluxTransformer2DModel",
        _BOTH,
        packed.flux,
        notes=_REFERENCES,
        references=FluxReferences(),
        prompts=LongerText(ids="txt_ids"),
    ),
    diffusers_family(
        "flux2",
        "FLUX.2",
        "Flux2Transformer2DModel",
        _BOTH,
        packed.flux2,
        notes=f"{_REFERENCES} So it is with cached keys (Klein KV).",
    ),
    diffusers_family(
        "flux3",
        "FLUX.3",
        "Flux3Transformer2DModel",
        ((r"single_transformer_blocks\.\d+\.attn", "joint"), (r"mode_blocks\.image\.\d+\.attn", "self")),
        packed.flux3,
        notes=_REFERENCES,
    ),
    diffusers_family(
        "chroma", "Chroma", "ChromaTransformer2DModel", _BOTH, packed.chroma, notes=_PADDED, key_padding=True
    ),
    diffusers_family("bria", "Bria 3.2", "BriaTransformer2DModel", _BOTH, packed.flux),
    diffusers_family(
        "bria_fibo", "Bria Fibo", "BriaFiboTransformer2DModel", _BOTH, packed.bria_fibo, notes=_PADDED, key_padding=True
    ),
    diffusers_family("ovis_image", "Ovis-Image", "OvisImageTransformer2DModel", _BOTH, packed.flux),
    diffusers_family(
        "longcat_image", "LongCat-Image", "LongCatImageTransformer2DModel", _BOTH, packed.flux, notes=_REFERENCES
    ),
    diffusers_family(
        "krea2",
        "Krea 2",
        "Krea2Transformer2DModel",
        ((r"transformer_blocks\.\d+\.attn", "joint"),),
        packed.krea2,
        notes="Prompts with padding inside of them stay dense.",
        key_padding=True,
    ),
    diffusers_family(
        "ideogram4",
        "Ideogram 4",
        "Ideogram4Transformer2DModel",
        ((r"layers\.\d+\.attention", "joint"),),
        packed.ideogram4,
        notes="Prompts with padding before them stay dense.",
        key_padding=True,
        time_rises=True,
    ),
    diffusers_family(
        "qwen_image",
        "Qwen-Image, Edit, Layered",
        "QwenImageTransformer2DModel",
        _BOTH,
        packed.qwen_image,
        notes=f"{_REFERENCES} {_PADDED}",
        key_padding=True,
    ),
    diffusers_family(
        "qwen_image21",
        "Qwen-Image 2.1",
        "QwenImage21Transformer2DModel",
        ((r"transformer_blocks\.\d+\.attn", "joint"),),
        packed.qwen_image21,
        notes="Prompt and references are dense, the picture that is made is sparse. Its flex processor stays dense.",
        key_padding=True,
        in_parts=True,
    ),
    diffusers_family(
        "nucleus_image",
        "Nucleus-Image",
        "NucleusMoEImageTransformer2DModel",
        _BOTH,
        packed.nucleus_image,
        notes="Its text gives keys only.",
        key_padding=True,
    ),
)
