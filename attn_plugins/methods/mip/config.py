"""The options of MIP."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Any

from attn_plugins.method import MethodConfig
from attn_plugins.ops.checks import BACKENDS


@dataclass(frozen=True)
class MIPConfig(MethodConfig):
    """Which reference is called what, and how they share the picture.

    Args:
        phrases: a name for each reference, in the order of the images, adapter by adapter: ["cat", "dog"]. Each is
            encoded alone, and best stands in the prompt word for word.
        photos: images of each reference, one after another: [2, 1] are two of the cat and one of the dog. Their
            projected tokens are averaged. None: one each.
        scales: strength of the references, one number or one each, times what `set_ip_adapter_scale` says.
        temperature: of the choice between the references: 1 is the paper; larger ones blend, infinity is the mean.
        null_bias: a column for what belongs to no reference: at 0 it is as strong as a name that is everywhere alike,
            at -2 weaker. None: none, as in the paper: every position takes from the references.
        checkpoint: file of a MIP checkpoint (.bin or .safetensors), for its `text_to_weight`, which diffusers drops
            when it loads the rest; a path, or owner/name/path of a file on the Hub. None: training-free. A list: one
            for each adapter, of plain ones None; one file alone is for all adapters.
        train: make `text_to_weight` a weight of each layer, to be trained: from `checkpoint`, else zeros, which change
            nothing. `handle.named_weights()` gives them.
        backend: "auto", "cpu", "triton" or "reference".
    """

    phrases: Any = ()
    photos: Any = None
    scales: Any = 1.0
    temperature: float = 1.0
    null_bias: float | None = None
    checkpoint: Any = None
    train: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        phrases = (self.phrases,) if isinstance(self.phrases, str) else self.phrases
        if not isinstance(phrases, tuple) or not phrases or not all(isinstance(phrase, str) for phrase in phrases):
            raise ValueError(f"phrases={self.phrases!r}: give a name for each reference image, as in ['cat', 'dog']")
        for phrase in phrases:
            if not phrase.strip():
                raise ValueError(f"phrases={list(phrases)}: a phrase is empty; name what its image shows")
        object.__setattr__(self, "phrases", phrases)
        if self.checkpoint is not None:
            self._check_checkpoint()
        self._check_photos()
        scales = self.scales if isinstance(self.scales, tuple) else (self.scales,)
        if len(scales) not in (1, len(phrases)) or not all(isinstance(scale, numbers.Real) for scale in scales):
            raise ValueError(f"scales={self.scales!r}: give one number, or one for each of {len(phrases)} phrases")
        if not isinstance(self.temperature, numbers.Real) or not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature!r}: give a positive number (1 is the paper)")
        if self.null_bias is not None and not isinstance(self.null_bias, numbers.Real):
            raise ValueError(f"null_bias={self.null_bias!r}: give a number, or None for no background column")
        if not isinstance(self.train, bool):
            raise ValueError(f"train={self.train!r}: give true or false")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend={self.backend!r}: legal are {', '.join(BACKENDS)}")

    def _check_checkpoint(self) -> None:
        several = isinstance(self.checkpoint, tuple)
        given = self.checkpoint if several else (self.checkpoint,)
        if several and (self.train or not any(one is not None for one in given)):
            raise ValueError(
                f"checkpoint={list(given)}: a list has a file for each adapter (None of plain ones), at least one; "
                "train=True takes one file for all"
            )
        paths = tuple(None if one is None else str(one) for one in given)
        object.__setattr__(self, "checkpoint", paths if several else paths[0])

    def _check_photos(self) -> None:
        if self.photos is None:
            return
        counts = (self.photos,) if isinstance(self.photos, int) else self.photos
        good = isinstance(counts, tuple) and all(type(count) is int and count > 0 for count in counts)
        if not good or len(counts) != len(self.phrases):
            raise ValueError(
                f"photos={self.photos!r}: give the number of images of each of the {len(self.phrases)} phrases "
                f"{list(self.phrases)}, 1 or more"
            )
        object.__setattr__(self, "photos", counts)

    @property
    def images(self) -> tuple[int, ...]:
        """Images of each reference."""
        return self.photos or (1,) * len(self.phrases)

    @property
    def strengths(self) -> tuple[float, ...]:
        """A scale for each reference."""
        scales = self.scales if isinstance(self.scales, tuple) else (self.scales,)
        return tuple(map(float, scales)) * (1 if len(scales) == len(self.phrases) else len(self.phrases))
