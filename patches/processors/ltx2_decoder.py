"""The 3-D neighborhood attention of diffusers' LTX-2 diffusion decoder, run by our operator. Exact, not a method.

Its own processors are a FlexAttention one, whose BlockMask outgrows memory on real grids and which has no backward on
CPU, and one that downloads a NATTEN build for some GPUs. This one makes no mask, downloads nothing and trains:

    from attn_plugins.patches.processors.ltx2_decoder import use_neighborhood_attention
    undo = use_neighborhood_attention(pipe)      # or the LTX2VideoDiffusionDecoderModel itself
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from attn_plugins.ops import neighborhood_attention

ATTENTION = "LTX2VideoVaeNeighborhoodAttention"


class LTX2NeighborhoodProcessor:
    """For `LTX2VideoVaeNeighborhoodAttention.set_processor`. Stateless; one instance may serve all layers.

    Args:
        backend: of `attn_plugins.ops.neighborhood_attention`.
    """

    def __init__(self, backend: str = "auto") -> None:
        self.backend = backend

    def __call__(self, attn: Any, hidden_states: torch.Tensor, block_mask: object = None) -> torch.Tensor:
        """hidden_states and result: (B, T, H, W, C). `block_mask` is for FlexAttention; the decoder gives None."""
        grid = tuple(hidden_states.shape[1:4])
        query, key, value = (t.flatten(1, 3).transpose(1, 2) for t in attn.project_qkv(hidden_states))
        # under autocast the norms leave query and key in float32; the scale is in the query already
        out = neighborhood_attention(
            query.to(value.dtype),
            key.to(value.dtype),
            value,
            grid=grid,
            window=tuple(attn.kernel_size),
            scale=1.0,
            backend=self.backend,
        )
        assert isinstance(out, torch.Tensor)  # no LSE was asked for
        return attn.to_out[0](out.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1))


def use_neighborhood_attention(model: Any, *, backend: str = "auto") -> Callable[[], None]:
    """Run all neighborhood attention of an LTX-2 diffusion decoder on our operator.

    Args:
        model: an `LTX2VideoDiffusionDecoderModel`, any module that contains its attention, or a pipeline.
        backend: of `attn_plugins.ops.neighborhood_attention`.

    Returns:
        What puts the former processors back. Where something else has been set meanwhile, that stays.

    Raises:
        ValueError: nothing in `model` is such an attention.
    """
    roots = [model] if isinstance(model, nn.Module) else list(getattr(model, "components", {}).values())
    sites: list[Any] = [
        module
        for root in roots
        if isinstance(root, nn.Module)
        for module in root.modules()
        if any(base.__name__ == ATTENTION for base in type(module).__mro__)
    ]
    if not sites:
        raise ValueError(
            f"{type(model).__name__} has no {ATTENTION}: give an LTX2VideoDiffusionDecoderModel or a pipeline with one"
        )
    processor = LTX2NeighborhoodProcessor(backend)
    former = [(site, site.processor) for site in sites]
    for site in sites:
        site.set_processor(processor)

    def undo() -> None:
        for site, before in former:
            if site.processor is processor:
                site.set_processor(before)

    return undo
