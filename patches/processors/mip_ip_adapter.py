"""IP-Adapter's processor for methods that merge its reference images, in the place of diffusers' own.

The class of the loaded processor is swapped in place, so `to_k_ip`, `to_v_ip` and `scale` are the adapter's, and
`set_ip_adapter_scale`, `unload_ip_adapter`, moves and saving go on as before. It runs the original's code without
images: its one attention is that of the text, where the references are merged in. So norms, projections, residuals and
LoRA stay the original's business.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

from attn_plugins.method import AttentionCall
from attn_plugins.patches.adapter_images import (
    Images,
    image_tokens,
    reference_masks,
    reference_rows,
    reference_scales,
)
from attn_plugins.patches.interception import ORIGINAL, STATE, Functional, rebound
from attn_plugins.references import REFERENCES, References
from attn_plugins.runtime import Layer


class _Running(threading.local):
    """The merge that the running processor's attention ends with; `__init__` runs in each thread."""

    def __init__(self) -> None:
        self.merge: _Merge | None = None


_running = _Running()


class _Merge:
    """What a running layer merges into its text attention."""

    def __init__(self, processor: Any, attn: Any, layer: Layer, images: Images, masks: Any) -> None:
        self.processor = processor
        self.attn = attn
        self.layer = layer
        self.images = images
        self.masks = masks

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """q and the layer's attention to its text, (B, H, S, D), to that of text and references."""
        method, adapter = self.layer.processor, self.processor
        counts = [one.shape[1] for one in self.images]
        scales = reference_scales(adapter.scale, counts, method.photos)  # type: ignore[attr-defined]
        if not any(scales):
            return text  # as the original does: a block without the adapter costs nothing
        keys, values, lengths = image_tokens(adapter, self.images, method.photos, self.attn.heads)  # type: ignore[attr-defined]
        masks = None
        if self.masks is not None:
            masks = reference_masks(self.masks, counts, method.photos, query.shape[2], query.device)  # type: ignore[attr-defined]
        phrases = self.layer.references
        trained: Any = self.layer.weights_of(self.attn)
        weight = phrases.weight(query.device) if trained is None else trained.text_to_weight
        if trained is None and weight is not None and weight.ndim == 2:  # one for each adapter
            weight = reference_rows(weight, counts, method.photos)  # type: ignore[attr-defined]
        call = AttentionCall(
            query, key, value, self.layer.kind, self.layer.root.moment.sequence, watch=self.layer.watch
        )
        call.extras[REFERENCES] = References(
            text, phrases.keys(self.attn).to(query.dtype), phrases.phrases.lengths,
            keys.to(query.dtype), values.to(query.dtype), lengths, scales, masks, weight,
        )  # fmt: skip
        return self.layer.processor(call)


def _sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None, *args: Any,
    **kwargs: Any,
) -> torch.Tensor:  # fmt: skip
    """The text's attention, and the merge."""
    text = F.scaled_dot_product_attention(query, key, value, attn_mask, *args, **kwargs)
    merge = _running.merge
    return text if merge is None else merge(query, key, value, text)


_original = rebound(IPAdapterAttnProcessor2_0.__call__, {"F": Functional(_sdpa)})


class MIPAttnProcessor2_0(IPAdapterAttnProcessor2_0):
    """Stands in for `IPAdapterAttnProcessor2_0`, whose argument names diffusers asks for."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        scale: float = 1.0,
        ip_adapter_masks: Any = None,
    ) -> torch.Tensor:
        """As the original's; `encoder_hidden_states` is the text and a list of (B, images, T, C), one an adapter."""
        layer = attn.__dict__.get(STATE)
        if layer is None or _stays(layer, hidden_states) or not isinstance(encoder_hidden_states, tuple):
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, scale, ip_adapter_masks
            )
        text, images = encoder_hidden_states
        before = _running.merge
        _running.merge = _Merge(self, attn, layer, images, ip_adapter_masks)
        try:
            return _original(self, attn, hidden_states, (text, []), attention_mask, temb, scale, None)
        finally:
            _running.merge = before


def _stays(layer: Layer, hidden_states: torch.Tensor) -> bool:
    """Whether a step or a grid was left to the original when the model was patched."""
    moment, least = layer.root.moment, layer.root.least_tokens(hidden_states.device)
    return moment.dense or (moment.sequence is not None and moment.sequence.tokens < least)


setattr(MIPAttnProcessor2_0, ORIGINAL, IPAdapterAttnProcessor2_0)  # how an undo finds the way back
