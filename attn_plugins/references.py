"""Between an image adapter's layers (patches/) and methods that merge its reference images (methods/mip/)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import nn

from attn_plugins.method import AttentionCall, Processor

REFERENCES = "references"  # where a call's `extras` holds them


@dataclass
class References:
    """What a layer knows of R reference images in one call, beside its text. Shapes as of `ops.weighted_merge`.

    text_out (B, H, S, D): its attention to the text; zeros where the model adds the images elsewhere. phrase_k
    (1 or B, R, H, L, D), phrase_lengths (1 or B, R): keys of the phrases. image_k, image_v (B, R, H, T, D),
    image_lengths (1, R) or None: of the images. scales: R numbers. masks (1, R, S) or None. text_weight (H * D,),
    (R, H * D) or None. phrase_q (B, H, S, D): the queries that meet the phrases; None are the call's.
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
    phrase_q: torch.Tensor | None = None

    @classmethod
    def of(cls, call: AttentionCall) -> References:
        """Those of a call of a method that merges references."""
        found = call.extras[REFERENCES]
        assert isinstance(found, cls)  # the family puts them there for whoever asks
        return found


class TextToWeight(nn.Module):
    """MIP's `text_to_weight` as a weight of a layer, to be trained: a row (1, C), as in the files.

    Args:
        row: (C,) or (1, C), where it begins; zeros change nothing, for a sigmoid over its own mean is then 1.
    """

    def __init__(self, row: torch.Tensor) -> None:
        super().__init__()
        self.text_to_weight = nn.Parameter(row.detach().clone().reshape(1, -1))


class ReferenceProcessor(Processor):
    """A processor of cross-attention that takes a call's `References`, and returns text and references together.

    phrases: a name for each reference, in the order of the images. photos: images of each reference, whose tokens are
    averaged. trains: the layers' `text_to_weight` are parameters of the model.
    """

    measure = "cost"
    trains: bool = False
    phrases: tuple[str, ...]
    photos: tuple[int, ...]

    def text_weights(self, widths: list[int]) -> list[torch.Tensor] | None:
        """`text_to_weight` of all cross-attention layers of a model, in order, given their widths; None: none.

        (C,) a layer, or (adapters, C). Called once a patch.

        Raises:
            ValueError: a checkpoint that is not for such layers, or cannot be read.
        """
        return None

    @abstractmethod
    def __call__(self, call: AttentionCall) -> torch.Tensor:
        """(B, H, S, D), in q's memory layout."""
