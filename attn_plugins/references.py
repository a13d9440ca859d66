"""Between an image adapter's layers (patches/) and methods that merge its reference images (methods/mip/)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch

from attn_plugins.method import AttentionCall, Processor

REFERENCES = "references"  # where a call's `extras` holds them


@dataclass
class References:
    """What a layer knows of R reference images in one call, beside its text. Shapes as of `ops.weighted_merge`.

    text_out (B, H, S, D): its attention to the text. phrase_k (1 or B, R, H, L, D), phrase_lengths (1 or B, R): keys of
    the phrases. image_k, image_v (B, R, H, T, D), image_lengths (1, R) or None: of the images. scales: R numbers.
    masks (1, R, S) or None. text_weight (H * D,) or None.
    """

    text_out: torch.Tensor
    phrase_k: torch.Tensor
    phrase_lengths: torch.Tensor
    image_k: torch.Tensor
    image_v: torch.Tensor
    image_lengths: torch.Tensor | None
    scales: tuple[float, ...]
    masks: torch.Tensor | None = None
    text_weight: torch.Tensor | None = None

    @classmethod
    def of(cls, call: AttentionCall) -> References:
        """Those of a call of a method that merges references."""
        found = call.extras[REFERENCES]
        assert isinstance(found, cls)  # the family puts them there for whoever asks
        return found


class ReferenceProcessor(Processor):
    """A processor of cross-attention that takes a call's `References`, and returns text and references together.

    phrases: a name for each reference, in the order of the images. photos: images of each reference, whose tokens are
    averaged.
    """

    measure = "cost"
    phrases: tuple[str, ...]
    photos: tuple[int, ...]

    def text_weights(self, widths: list[int]) -> list[torch.Tensor] | None:
        """`text_to_weight` of all cross-attention layers of a model, in order, given their widths; None: none.

        Called once a patch.

        Raises:
            ValueError: a checkpoint that is not for such layers, or cannot be read.
        """
        return None

    @abstractmethod
    def __call__(self, call: AttentionCall) -> torch.Tensor:
        """(B, H, S, D), in q's memory layout."""
