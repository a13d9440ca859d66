"""Methods that merge the reference images of an IP-Adapter: what they need of a model, checked and put in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from attn_plugins.patches.adapter_images import groups, images_of
from attn_plugins.patches.checkpointing import Weakly
from attn_plugins.patches.family import Family, Site
from attn_plugins.patches.grids.arguments import argument
from attn_plugins.patches.interception import ORIGINAL
from attn_plugins.patches.phrases import LayerPhrases, encode
from attn_plugins.patches.processor_swap import Swapped
from attn_plugins.references import ReferenceProcessor
from attn_plugins.runtime import Layer, RootState

ADAPTED = "IPAdapterAttnProcessor2_0"  # the processor that `load_ip_adapter` sets
_LOAD = "call pipe.load_ip_adapter(...) first"


def adapter_of(root: nn.Module) -> nn.Module | None:
    """The image projections of the loaded IP-Adapters, or None."""
    found = getattr(root, "encoder_hid_proj", None)
    return found if hasattr(found, "image_projection_layers") else None


def _refuse_replaced(modules: Sequence[nn.Module]) -> None:
    """Raise where an IP-Adapter is loaded and something has replaced its processors since."""
    for module in modules:
        cls = type(module.processor)
        if cls.__name__ != ADAPTED and ORIGINAL not in cls.__dict__:
            raise ValueError(
                f"the IP-Adapter's attention processors were replaced by {cls.__name__} (attention slicing, fused QKV "
                "projections, xFormers?), which knows no reference images: take that back "
                "(pipe.unfuse_qkv_projections(), or pipe.disable_xformers_memory_efficient_attention()), or load the "
                "IP-Adapter after it"
            )


class MergingSwapped(Swapped):
    """The processors of the layers that merge, swapped. What is no IP-Adapter's waits: see `ReferenceHook`."""

    def keep(self, state: RootState | None = None) -> None:
        from attn_plugins.patches.processors.mip_ip_adapter import MIPAttnProcessor2_0

        for module in self.modules:
            processor = module.processor
            if type(processor).__name__ == ADAPTED and ORIGINAL not in type(processor).__dict__:
                processor.__class__ = MIPAttnProcessor2_0
                self.touched = [*(other for other in self.touched if other.ref() is not None), Weakly(processor)]


class ReferenceHook:
    """Before each forward of the root, after the others: are the images there, and as many as the phrases?

    Never compiled, as the root's other hook.
    """

    def __init__(self, state: RootState, layers: list[tuple[Site, Layer]]) -> None:
        self.state = state
        self.modules = [site.module for site, _ in layers]
        self.layer = layers[0][1]

    @torch.compiler.disable(reason="attn_plugins counts reference images before the model's graph begins")
    def __call__(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        processor: Any = self.layer.processor  # a ReferenceProcessor, or what measures one
        if not adapter_of(root):
            self.state.refuse(f"the IP-Adapter was unloaded: {_LOAD} to merge references again, or unpatch")
            return
        _refuse_replaced(self.modules)
        names = list(processor.phrases)
        embeds = (argument(root, args, kwargs, "added_cond_kwargs") or {}).get("image_embeds")
        if embeds is None:
            raise ValueError(
                f"the call has no reference images for {names}: give the pipeline ip_adapter_image or "
                "ip_adapter_image_embeds, or unpatch for a picture without them"
            )
        counts = images_of(embeds)
        if sum(counts) != sum(processor.photos):
            raise ValueError(
                f"{len(names)} phrases {names} name {sum(processor.photos)} reference images, and the call has "
                f"{sum(counts)} (by adapter: {', '.join(map(str, counts))}): give one phrase for each image, or "
                "photos=[...] for several images of one object"
            )
        groups(counts, processor.photos)
        text = argument(root, args, kwargs, "encoder_hidden_states")
        phrases = self.layer.references.phrases
        if phrases.rows.shape[-1] != text.shape[-1]:
            raise ValueError(
                f"the phrases were encoded to {phrases.rows.shape[-1]} channels, the prompt has {text.shape[-1]}: "
                "patch the pipeline that is called"
            )
        phrases.place(text.device, text.dtype)


class IPAdapterReferences:
    """How methods get at an IP-Adapter's reference images: `references` of a family."""

    def prepare(self, root: nn.Module, family: Family, pipe: object, layers: Sequence[Layer]) -> None:
        """Before a patch: an IP-Adapter must be loaded; encodes the phrases and hands each layer its own.

        Raises:
            ValueError: no IP-Adapter, processors that something has replaced, or phrases that cannot be encoded.
        """
        processor = layers[0].processor
        assert isinstance(processor, ReferenceProcessor)  # patching asks for methods that merge references
        sites = [site for site in family.find_sites(root) if site.kind == "cross"]
        if not adapter_of(root):
            raise ValueError(f"{type(root).__name__} has no IP-Adapter: {_LOAD}, then patch")
        if getattr(root, "text_encoder_hid_proj", None) is not None:
            raise ValueError("Kolors projects its text once more, and its tokenizer is not CLIP's: it takes no phrases")
        names = {layer.name for layer in layers}
        _refuse_replaced([site.module for site in sites if site.name in names])
        widths = [site.module.inner_dim for site in sites]  # type: ignore[union-attr]
        weights = processor.text_weights([int(width) for width in widths])  # type: ignore[arg-type]
        phrases = encode(pipe, processor.phrases)
        for layer in layers:
            layer.references = LayerPhrases(phrases, None if weights is None else weights[layer.index])

    def swapped(self, modules: list[nn.Module]) -> Swapped:
        """What keeps their processors in place."""
        return MergingSwapped(modules)

    def hook(self, state: RootState, layers: list[tuple[Site, Layer]]) -> ReferenceHook:
        """What looks at each call of the root first."""
        return ReferenceHook(state, layers)
