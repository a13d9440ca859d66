"""FLUX's IP-Adapter for methods that merge reference images: its double blocks, its two passes, its prompts' words."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from attn_plugins.method import SiteKind
from attn_plugins.patches.adapter_images import images_of, reference_masks
from attn_plugins.patches.adapter_references import LOAD, adapter_of, check_images
from attn_plugins.patches.checkpointing import Weakly
from attn_plugins.patches.family import Family, Site, Undo
from attn_plugins.patches.grids.arguments import argument, replaced
from attn_plugins.patches.interception import ORIGINAL
from attn_plugins.patches.processor_swap import Swapped
from attn_plugins.patches.prompt_phrases import Listening, NotSaid, PromptPhrases
from attn_plugins.references import ReferenceProcessor
from attn_plugins.runtime import Layer, RootState

ADAPTED = "FluxIPAdapterAttnProcessor"  # the processor that `load_ip_adapter` sets in the double blocks
_KWARGS = "joint_attention_kwargs"


class LayerWords:
    """What a layer knows of a patch's phrases: they are found in each prompt, and it has nothing of its own."""

    def __init__(self, phrases: PromptPhrases, encoder: nn.Module) -> None:
        self.phrases = phrases
        self.encoder: Callable[[], nn.Module | None] = weakref.ref(encoder)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "encoder": _gone}  # the pipeline's, which is not copied with the model


def _gone() -> None:
    """A text encoder that a copy has not."""


class FluxSwapped(Swapped):
    """The processors of the double blocks, swapped. What is no IP-Adapter's waits: see `FluxReferenceHook`."""

    def keep(self, state: RootState | None = None) -> None:
        from attn_plugins.patches.processors.mip_flux import MIPFluxIPAdapterAttnProcessor

        for module in self.modules:
            processor = module.processor
            if type(processor).__name__ == ADAPTED and ORIGINAL not in type(processor).__dict__:
                processor.__class__ = MIPFluxIPAdapterAttnProcessor
                self.touched = [*(other for other in self.touched if other.ref() is not None), Weakly(processor)]


class _Last(threading.local):
    """The last pass that was for a prompt: its latents and its text, and the images that each adapter had."""

    def __init__(self) -> None:
        self.latents: Callable[[], torch.Tensor | None] = _gone
        self.text: Callable[[], torch.Tensor | None] = _gone
        self.counts: list[int] = []


class FluxReferenceHook:
    """Before each forward of the root, after the others: counts the images, finds the phrases, and tells the layers.

    Under true guidance a second forward, of the negative prompt, gets the same latents with another text. If that does
    not say the phrases, no position belongs to one more than another there. By default it has one black image an
    adapter, which stands for each of the adapter's.
    """

    def __init__(self, state: RootState, layers: list[tuple[Site, Layer]]) -> None:
        self.state = state
        self.modules = [site.module for site, _ in layers]
        self.layer = layers[0][1]
        self.last = _Last()

    @torch.compiler.disable(reason="attn_plugins looks for phrases in the prompt before the model's graph begins")
    def __call__(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from attn_plugins.patches.processors.mip_flux import Merging

        if not adapter_of(root):
            self.state.refuse(f"the IP-Adapter was unloaded: {LOAD} to merge references again, or unpatch")
            return None
        refuse_replaced(self.modules)
        if getattr(root, "_parallel_config", None) is not None or self.state.shared_heads is not None:
            self.state.refuse("each device holds a part of the picture or of the heads, and relevance is over all")
            return None
        processor: Any = self.layer.processor  # a ReferenceProcessor, or what measures one
        given = dict(argument(root, args, kwargs, _KWARGS) or {})
        name = "ip_adapter_image_embeds" if "ip_adapter_image_embeds" in given else "ip_hidden_states"
        latents, text = (argument(root, args, kwargs, one) for one in ("hidden_states", "encoder_hidden_states"))
        again = self.last.latents() is latents and self.last.text() is not text
        counts = [] if given.get(name) is None else images_of(given[name])
        if again and counts == [1] * len(self.last.counts) and counts != self.last.counts:
            counts = self.last.counts
            given[name] = [
                one.expand(-1, count, *one.shape[2:]) for one, count in zip(_list(given[name]), counts, strict=True)
            ]
        check_images(processor, counts)
        rows, lengths = self._phrases(text, again)
        if not again:
            self.last.latents, self.last.text, self.last.counts = weakref.ref(latents), weakref.ref(text), counts
        if self.state.moment.dense:
            return None
        masks = self._masks(given.get("ip_adapter_masks"), counts, processor.photos, latents)
        given["ip_adapter_masks"] = Merging(rows, lengths, masks)
        return replaced(root, args, kwargs, _KWARGS, given)

    def _phrases(self, encoding: torch.Tensor, again: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        phrases: PromptPhrases = self.layer.references.phrases
        if again and phrases.given is not None:  # that was said of the prompt
            return None, None
        try:
            return phrases.find(encoding)
        except NotSaid:
            if again:
                return None, None
            raise

    def _masks(
        self, masks: Any, counts: Sequence[int], photos: Sequence[int], latents: torch.Tensor
    ) -> torch.Tensor | None:
        """(1, R, S); behind the picture that is made, where pictures to edit stand, nothing is masked."""
        if masks is None:
            return None
        sequence = self.state.moment.sequence
        positions = latents.shape[1] if sequence is None else sequence.tokens
        small = reference_masks(masks, counts, photos, positions, latents.device)
        return nn.functional.pad(small, (0, latents.shape[1] - positions), value=1.0)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "last"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, last=_Last())


def _list(embeds: Any) -> list[torch.Tensor]:
    """(B, images, ...), one an adapter."""
    return list(embeds) if isinstance(embeds, (list, tuple)) else [embeds[:, None]]


def refuse_replaced(modules: Sequence[nn.Module]) -> None:
    """Raise where an IP-Adapter is loaded and something has replaced its processors since."""
    for module in modules:
        cls = type(module.processor)
        if cls.__dict__.get(ORIGINAL, cls).__name__ != ADAPTED:
            raise ValueError(
                f"the IP-Adapter's attention processors were replaced by {cls.__name__}, which knows no reference "
                "images: take that back, or load the IP-Adapter again"
            )


class FluxReferences:
    """How methods get at the reference images of FLUX's IP-Adapter: `references` of its family."""

    takes: SiteKind = "joint"  # of the double blocks

    def sites(self, sites: list[Site]) -> list[Site]:
        """The double blocks' attention, as what it is to the images: cross-attention. Single blocks have no adapter."""
        return [
            dataclasses.replace(site, kind="cross") if hasattr(site.module, "add_k_proj") else site for site in sites
        ]

    def prepare(
        self, root: nn.Module, family: Family, pipe: Any, layers: Sequence[Layer]
    ) -> dict[str, Callable[[], nn.Module]]:
        """Before a patch: an IP-Adapter must be loaded, and the pipeline must be able to read phrases. See
        `IPAdapterReferences.prepare`.

        Raises:
            ValueError: no IP-Adapter, replaced processors, no pipeline or text encoder, phrases without tokens, weights
                that such an adapter has not.
        """
        processor = layers[0].processor
        assert isinstance(processor, ReferenceProcessor)  # patching asks for methods that merge references
        if not adapter_of(root):
            raise ValueError(f"{type(root).__name__} has no IP-Adapter: {LOAD}, then patch")
        modules = [root.get_submodule(layer.name) for layer in layers]
        if processor.trains or processor.text_weights([int(module.inner_dim) for module in modules]) is not None:  # type: ignore[arg-type]
            raise ValueError(
                "text_to_weight is of Stable Diffusion's adapters: leave checkpoint and train out for FLUX"
            )
        refuse_replaced(modules)
        encoder, tokenizer = getattr(pipe, "text_encoder_2", None), getattr(pipe, "tokenizer_2", None)
        if pipe is None or encoder is None or tokenizer is None:
            what = "patch the pipeline, not its transformer" if pipe is None else "load text_encoder_2 and tokenizer_2"
            raise ValueError(f"phrases {list(processor.phrases)} are looked for in the prompt as T5 reads it: {what}")
        convert = getattr(pipe, "maybe_convert_prompt", None)
        words = [convert(name, tokenizer) if callable(convert) else name for name in processor.phrases]
        phrases = PromptPhrases(processor.phrases, tokenizer, words)
        for layer in layers:
            layer.references = LayerWords(phrases, encoder)
        return {}

    def swapped(self, modules: list[nn.Module]) -> Swapped:
        """What keeps their processors in place."""
        return FluxSwapped(modules)

    def attach(self, root: nn.Module, state: RootState, layers: list[tuple[Site, Layer]]) -> list[Undo]:
        """Listens to the text encoder, and looks at each call of the root first."""
        words: LayerWords = layers[0][1].references
        listening = Listening(words.phrases, words.encoder())
        hook = root.register_forward_pre_hook(FluxReferenceHook(state, layers), with_kwargs=True)
        return [listening.stop, hook.remove]
