"""Phrases inside a prompt, for models of joint attention: their text is what the prompt has become, layer by layer.

Such a model gets the prompt's encoding, not its words. A hook on the text encoder notes the words that it encodes, and
a mark of what it made of them; by that an encoding is known again wherever it comes back: repeated for several
pictures, cast, kept from earlier.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attn_plugins.patches.grids.arguments import TensorReading
from attn_plugins.patches.phrase_places import places, text_of

MARK, READ = 64, 64  # channels of an encoding that are kept to know it by; encoded batches that are remembered
SHOWN = 100  # letters of a prompt in a message


class NotSaid(ValueError):
    """A prompt that does not say the phrases, or whose words are not known."""


@dataclass(frozen=True)
class Read:
    """A batch that was encoded: the pieces of each prompt, without padding, and their marks, (B, N, MARK or less)."""

    pieces: list[list[str]]
    mark: torch.Tensor


class PromptPhrases:
    """Where R phrases stand in the prompts of one text encoder. Shared by all layers of a patch.

    A copy of the model keeps to the same one; a pickled one knows what `set` told it alone.

    Attributes:
        names: the phrases.
        words: what stands for them in the tokenizer (textual inversion makes several tokens of one word).
    """

    def __init__(self, names: Sequence[str], tokenizer: Any = None, words: Sequence[str] | None = None) -> None:
        self.names = tuple(names)
        self.tokenizer = tokenizer
        self.pieces = [self._tokens(word) for word in (words or names)] if tokenizer is not None else []
        self.given: tuple[torch.Tensor, torch.Tensor, int] | None = None  # with the last place
        self.read: deque[Read] = deque(maxlen=READ)
        self.listening: weakref.WeakSet[Listening] = weakref.WeakSet()
        self.hook: Any = None
        self._look_up = TensorReading(self._rows)

    def _tokens(self, word: str) -> list[str]:
        """Raises ValueError for a phrase that the text encoder cannot read."""
        ids = self.tokenizer(word, add_special_tokens=False).input_ids
        pieces: list[str] = self.tokenizer.convert_ids_to_tokens(ids)
        if not text_of(pieces):
            raise ValueError(f"phrase {word!r} is empty: it has no tokens")
        if all(piece == self.tokenizer.unk_token for piece in pieces if text_of([piece])):
            raise ValueError(f"phrase {word!r}: the text encoder knows none of its letters")
        return pieces

    def set(self, rows: torch.Tensor | None, lengths: torch.Tensor | None = None) -> None:
        """Say where the phrases stand: for encodings from elsewhere, and in training.

        Args:
            rows: (1 or B, R, L) integers, places in the encoded prompt. None: look them up again.
            lengths: (1 or B, R), how many of the L are meant.

        Raises:
            ValueError: shapes that do not go together, or places before the first.
        """
        if rows is None:
            self.given = None
            return
        if lengths is None or rows.ndim != 3 or lengths.shape != rows.shape[:2] or rows.shape[1] != len(self.names):
            told = None if lengths is None else tuple(lengths.shape)
            raise ValueError(
                f"rows {tuple(rows.shape)}, lengths {told}: give (1 or B, {len(self.names)}, L) and "
                f"(1 or B, {len(self.names)})"
            )
        first, last = (int(value) for value in rows.aminmax())
        if first < 0 or not 0 < int(lengths.min()) <= int(lengths.max()) <= rows.shape[2]:
            raise ValueError(f"rows from {first}, lengths {lengths.tolist()}: legal are 0 on, and 1..{rows.shape[2]}")
        self.given = rows, lengths, last

    def find(self, encoding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (B, R, L) and lengths (B, R) of the phrases in an encoding (B, N, C). Reads its values once.

        Raises:
            NotSaid: a prompt without one of them, or of unknown words.
            ValueError: places that are not in this encoding.
        """
        if self.given is not None:
            batch, tokens = encoding.shape[:2]
            rows, lengths, last = self.given
            if len(rows) not in (1, batch) or last >= tokens:
                raise ValueError(
                    f"the phrases were said to stand in {len(rows)} prompts, up to token {last}; the call "
                    f"has {batch} of {tokens} tokens"
                )
            rows, lengths = rows.to(encoding.device), lengths.to(encoding.device)
            return rows.expand(batch, -1, -1), lengths.expand(batch, -1)
        found: tuple[torch.Tensor, torch.Tensor] = self._look_up(encoding)
        return found

    def _rows(self, encoding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        each = [self._places(pieces) for pieces in self._prompts(encoding)]
        most = max(len(row) for found in each for row in found)
        rows = [[row + [0] * (most - len(row)) for row in found] for found in each]
        lengths = [[len(row) for row in found] for found in each]
        return torch.tensor(rows, device=encoding.device), torch.tensor(lengths, device=encoding.device)

    def _places(self, prompt: list[str]) -> list[list[int]]:
        found = places(prompt, self.pieces)
        for name, row in zip(self.names, found, strict=True):
            if not row:
                said = text_of(prompt)
                said = said if len(said) <= SHOWN else f"{said[:SHOWN]}..."
                raise NotSaid(
                    f"the prompt {said!r} does not say {name!r}: where a reference belongs is read from its name in "
                    "the prompt (prompt_2, where there is one), so write it there word for word, among the first "
                    "max_sequence_length tokens"
                )
        return found

    def _prompts(self, encoding: torch.Tensor) -> list[list[str]]:
        """The pieces of each prompt of an encoded batch."""
        found: list[list[str] | None] = [None] * len(encoding)
        given = encoding[..., :MARK]
        for read in reversed(self.read):
            if read.mark.shape[1:] == given.shape[1:]:
                same = (given[:, None] == read.mark.to(given.device, given.dtype)).flatten(2).all(2).tolist()
                for item, row in enumerate(same):
                    if found[item] is None and any(row):
                        found[item] = read.pieces[row.index(True)]
        known = [pieces for pieces in found if pieces is not None]
        if len(known) < len(found):
            raise NotSaid(
                "the words of this prompt are not known: its encoding is none that the pipeline's text encoder made "
                "since the patch. Encode it by pipe.encode_prompt after patching (a model from a file: unpatch, and "
                "patch again), or say where the phrases stand: "
                "handle.patches[0].layers[0].references.phrases.set(rows, lengths)"
            )
        return known

    @torch.compiler.disable(reason="attn_plugins notes which words a prompt's encoding is of")
    def note(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After a forward of the text encoder."""
        if not self.listening and self.hook is not None:  # whoever wanted it is gone
            self.hook.remove()
            return
        ids, made = kwargs.get("input_ids", args[0] if args else None), output[0]
        if isinstance(ids, torch.Tensor) and made.shape[:2] == ids.shape:
            end, rows = self.tokenizer.eos_token_id, ids.tolist()
            rows = [row[: row.index(end)] if end in row else row for row in rows]
            pieces = [self.tokenizer.convert_ids_to_tokens(row) for row in rows]
            self.read.append(Read(pieces, made[..., :MARK].detach().clone()))

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptPhrases:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return PromptPhrases, (self.names,), {"given": self.given}


class Listening:
    """A patch that wants a text encoder's words noted: the last one to stop takes the hook off. A copy is one more."""

    def __init__(self, phrases: PromptPhrases, encoder: nn.Module | None = None) -> None:
        self.phrases = phrases
        phrases.listening.add(self)
        if encoder is not None:
            phrases.hook = encoder.register_forward_hook(phrases.note, with_kwargs=True)

    def stop(self) -> None:
        phrases = self.phrases
        phrases.listening.discard(self)
        if not phrases.listening and phrases.hook is not None:
            phrases.hook.remove()
            phrases.hook = None
            phrases.read.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return Listening, (self.phrases,)
