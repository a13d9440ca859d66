"""FLUX's IP-Adapter processor for methods that merge its reference images, in the place of diffusers' own.

The class of the loaded processor is swapped in place, as in `mip_ip_adapter`, and the original's code is run without
images. On the way two things are caught: what its joint attention is given, and its queries before they are rotated.
Rotated, the picture's queries meet the keys that the prompt's words have in this layer: that is relevance. As they
were, they meet the images, as in the original. The block adds what comes of it behind its feed-forward.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from diffusers.models.transformers import transformer_flux
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

from attn_plugins.method import AttentionCall
from attn_plugins.patches.adapter_images import Images, image_tokens, reference_scales
from attn_plugins.patches.interception import ORIGINAL, STATE, rebound
from attn_plugins.references import REFERENCES, References
from attn_plugins.runtime import Layer


class Merging(NamedTuple):
    """What the root's hook hands to the layers of a call, in the place of `ip_adapter_masks`, which stock FLUX ignores.

    It travels with the call: so it is that of its thread, of a checkpoint's recomputation, and an input of a compiled
    graph. rows (B, R, L), lengths (B, R): the phrases' tokens in the prompt; both None: no phrase is in it, and all
    references are alike. masks (1, R, S) or None.
    """

    rows: torch.Tensor | None
    lengths: torch.Tensor | None
    masks: torch.Tensor | None


class _Caught:
    """What a running processor's joint attention is given, (B, N, H, D), and its queries before they are rotated."""

    def __init__(self) -> None:
        self.plain: torch.Tensor | None = None
        self.attention: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None


class _Running(threading.local):
    """Where the processor that runs in this thread catches them; `__init__` runs in each thread."""

    def __init__(self) -> None:
        self.caught: _Caught | None = None


_running = _Running()


def _rotate(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The original's first rotation is of its queries."""
    caught = _running.caught
    if caught is not None and caught.plain is None:
        caught.plain = x
    return transformer_flux.apply_rotary_emb(x, *args, **kwargs)


def _dispatch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if _running.caught is not None:
        _running.caught.attention = query, key, value
    return transformer_flux.dispatch_attention_fn(query, key, value, *args, **kwargs)


_original = rebound(
    FluxIPAdapterAttnProcessor.__call__, {"apply_rotary_emb": _rotate, "dispatch_attention_fn": _dispatch}
)


class MIPFluxIPAdapterAttnProcessor(FluxIPAdapterAttnProcessor):
    """Stands in for `FluxIPAdapterAttnProcessor`, whose argument names diffusers asks for."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
        ip_hidden_states: Any = None,
        ip_adapter_masks: Any = None,
    ) -> Any:
        """As the original's; `ip_hidden_states`: (B, images, T, C), one an adapter."""
        given = (attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        layer: Layer | None = attn.__dict__.get(STATE)
        if layer is None or layer.root.moment.dense or not isinstance(ip_adapter_masks, Merging):
            return super().__call__(*given, ip_hidden_states)
        assert encoder_hidden_states is not None  # its block has both
        before = _running.caught
        _running.caught = caught = _Caught()
        try:
            hidden_states, text, nothing = _original(self, *given, [])
        finally:
            _running.caught = before
        words = encoder_hidden_states.shape[1]
        return hidden_states, text, self._merge(attn, layer, ip_adapter_masks, ip_hidden_states, caught, words, nothing)

    def _merge(
        self, attn: Any, layer: Layer, merging: Merging, images: Images, caught: _Caught, words: int,
        nothing: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """The references' part, (B, S, H * D). words: tokens of the prompt; nothing: zeros of that shape."""
        method: Any = layer.processor
        scales = reference_scales(self.scale, [one.shape[1] for one in images], method.photos)
        if not any(scales):
            return nothing  # a block without the adapter costs nothing
        assert caught.attention is not None  # the original asks for attention once
        query, key, value = caught.attention
        plain = query if caught.plain is None else caught.plain
        turned, q = (t[:, words:].transpose(1, 2) for t in (query, plain))
        text_k, text_v = (t[:, :words].transpose(1, 2) for t in (key, value))
        keys, values, lengths = image_tokens(self, images, method.photos, attn.heads)
        phrase_k, phrase_lengths = phrase_keys(text_k.detach(), merging, len(scales))
        watch = layer.watch if merging.rows is not None else None  # of a negative prompt nobody wants a map
        call = AttentionCall(q, text_k, text_v, layer.kind, layer.root.moment.sequence, watch=watch)
        call.extras[REFERENCES] = References(
            nothing.to(q.dtype).unflatten(-1, (attn.heads, -1)).transpose(1, 2), phrase_k, phrase_lengths,
            keys.to(q.dtype), values.to(q.dtype), lengths, scales, merging.masks, phrase_q=turned,
        )  # fmt: skip
        return method(call).transpose(1, 2).flatten(2).to(nothing.dtype)


def phrase_keys(text_k: torch.Tensor, merging: Merging, references: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B or 1, R, H, L, D) of the prompt's keys (B, H, N, D), and how many of the L are real, (B or 1, R).

    Where the prompt says no phrase they are zeros: such a key is everywhere alike.
    """
    if merging.rows is None or merging.lengths is None:
        _, heads, _, dim = text_k.shape
        ones = torch.ones(1, references, dtype=torch.int64, device=text_k.device)
        return text_k.new_zeros(1, references, heads, 1, dim), ones
    places = merging.rows.flatten(1)[:, None, :, None].expand(-1, text_k.shape[1], -1, text_k.shape[3])
    return text_k.gather(2, places).unflatten(2, merging.rows.shape[1:]).transpose(1, 2), merging.lengths


setattr(MIPFluxIPAdapterAttnProcessor, ORIGINAL, FluxIPAdapterAttnProcessor)  # how an undo finds the way back
