"""Between a model's text (patches/longer_text.py) and methods that put prompts beside it (methods/regions/).

The prompts join the text of the model's input, behind the person's own, so that everything that a model does to text it
does to them. Which token of the picture sees which prompt is the method's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attn_plugins.method import Processor


@dataclass(frozen=True)
class TextParts:
    """A text of several prompts, one behind the other.

    lengths: tokens of each, the person's own prompt first. rows: [start, stop) of the batch items that are for all of
    them; the others (the unconditional half of guidance) are for the first alone.
    """

    lengths: tuple[int, ...]
    rows: tuple[int, int]

    @property
    def length(self) -> int:
        """Tokens of all of them."""
        return sum(self.lengths)


@dataclass(frozen=True)
class Prompts:
    """What a method asks a family to put beside a model's text.

    prompts: strings, or embeddings (L, C) as the model takes them. The others are as in `RegionsConfig`.
    """

    prompts: tuple[Any, ...]
    guidance: str = "auto"
    max_sequence_length: int | None = None


class PromptProcessor(Processor):
    """A processor whose calls have `parts`, and which takes every call of such a forward: none may go on dense, for in
    it all prompts would be one."""

    measure = "cost"
    prompts: Prompts
