"""Methods that merge the reference images of an IP-Adapter: what they need of a model, checked and put in place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from attn_plugins.method import SiteKind
from attn_plugins.patches.adapter_images import groups, images_of
from attn_plugins.patches.checkpointing import Weakly
from attn_plugins.patches.family import Family, Site, Undo
from attn_plugins.patches.grids.arguments import argument
from attn_plugins.patches.interception import ORIGINAL
from attn_plugins.patches.phrases import LayerPhrases, encode
from attn_plugins.patches.processor_swap import Swapped
from attn_plugins.references import ReferenceProcessor, TextToWeight
from attn_plugins.runtime import Layer, RootState

ADAPTED = "IPAdapterAttnProcessor2_0"  # the processor that `load_ip_adapter` sets
LOAD = "call pipe.load_ip_adapter(...) first"


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


def check_images(processor: ReferenceProcessor, counts: Sequence[int]) -> None:
    """Raise where a call's images, by adapter, are not those that the phrases name."""
    names = list(processor.phrases)
    if not counts:
        raise ValueError(
            f"the call has no reference images for {names}: give the pipeline ip_adapter_image or "
            "ip_adapter_image_embeds, or unpatch for a picture without them"
        )
    if sum(counts) != sum(processor.photos):
        raise ValueError(
            f"{len(names)} phrases {names} name {sum(processor.photos)} reference images, and the call has "
            f"{sum(counts)} (by adapter: {', '.join(map(str, counts))}): give one phrase for each image, or "
            "photos=[...] for several images of one object"
        )
    groups(counts, processor.photos)


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
            self.state.refuse(f"the IP-Adapter was unloaded: {LOAD} to merge references again, or unpatch")
            return
        _refuse_replaced(self.modules)
        embeds = (argument(root, args, kwargs, "added_cond_kwargs") or {}).get("image_embeds")
        check_images(processor, [] if embeds is None else images_of(embeds))
        text = argument(root, args, kwargs, "encoder_hidden_states")
        phrases = self.layer.references.phrases
        if phrases.rows.shape[-1] != text.shape[-1]:
            raise ValueError(
                f"the phrases were encoded to {phrases.rows.shape[-1]} channels, the prompt has {text.shape[-1]}: "
                "patch the pipeline that is called"
            )
        phrases.place(text.device, text.dtype)


class IPAdapterReferences:
    """How methods get at an IP-Adapter's reference images: `references` of a family.

    takes: the kind of attention that has an adapter.
    """

    takes: SiteKind = "cross"

    def prepare(
        self, root: nn.Module, family: Family, pipe: object, layers: Sequence[Layer]
    ) -> dict[str, Callable[[], nn.Module]]:
        """Before a patch: an IP-Adapter must be loaded; encodes the phrases and hands each layer its own.

        Returns:
            What makes the weights of each layer, by its name, of processors that train them.

        Raises:
            ValueError: no IP-Adapter, processors that something has replaced, or phrases that cannot be encoded.
        """
        processor = layers[0].processor
        assert isinstance(processor, ReferenceProcessor)  # patching asks for methods that merge references
        sites = [site for site in family.find_sites(root) if site.kind == "cross"]
        if not adapter_of(root):
            raise ValueError(f"{type(root).__name__} has no IP-Adapter: {LOAD}, then patch")
        if getattr(root, "text_encoder_hid_proj", None) is not None:
            raise ValueError("Kolors projects its text once more, and its tokenizer is not CLIP's: it takes no phrases")
        names = {layer.name for layer in layers}
        _refuse_replaced([site.module for site in sites if site.name in names])
        widths = [site.module.inner_dim for site in sites]  # type: ignore[union-attr]
        weights = processor.text_weights([int(width) for width in widths])  # type: ignore[arg-type]
        adapters = len(adapter_of(root).image_projection_layers)  # type: ignore[union-attr, arg-type]
        if weights and weights[0].ndim == 2 and len(weights[0]) != adapters:
            raise ValueError(
                f"checkpoint names {len(weights[0])} files, and there are {adapters} IP-Adapters: one for each"
            )
        if processor.trains and adapters != 1:
            raise ValueError(f"train=True with {adapters} IP-Adapters: one is trained at a time, load it alone")
        phrases = encode(pipe, processor.phrases)
        if processor.trains:
            rows = weights or [torch.zeros(int(width)) for width in widths]  # type: ignore[arg-type]
            weights = None  # the layers' modules have them
        for layer in layers:
            layer.references = LayerPhrases(phrases, None if weights is None else weights[layer.index])
        if not processor.trains:
            return {}
        return {layer.name: functools.partial(TextToWeight, rows[layer.index]) for layer in layers}

    def swapped(self, modules: list[nn.Module]) -> Swapped:
        """What keeps their processors in place."""
        return MergingSwapped(modules)

    def sites(self, sites: list[Site]) -> list[Site]:
        """The sites as methods that merge references see them."""
        return sites

    def attach(self, root: nn.Module, state: RootState, layers: list[tuple[Site, Layer]]) -> list[Undo]:
        """What looks at each call of the root first."""
        return [root.register_forward_pre_hook(ReferenceHook(state, layers), with_kwargs=True).remove]
