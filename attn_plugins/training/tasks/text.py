"""Foreseeing the next token of running text, for any causal language model of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from attn_plugins.training.seeds import seeded
from attn_plugins.training.tasks.task import Task

HELD_OUT = 0.1  # of text files of one's own, the end


class TextTask(Task):
    """Rows of text, each from a place of its own.

    Args:
        load: gives the model.
        text, held_out: token ids, in one row each.
        length: of a row, tokens; each stands behind `start`, where the tokenizer has a token that begins texts.
        windows: how many held-out rows there are, spread evenly over the held-out text.
        name: of the text, for reports.

    Raises:
        ValueError: a text that is shorter than a row, or held-out text that is shorter than the windows.
    """

    unit = "perplexity"

    def __init__(
        self,
        load: Callable[[], Any],
        text: Sequence[int],
        held_out: Sequence[int],
        length: int,
        windows: int,
        *,
        start: int | None = None,
        name: str = "text",
    ) -> None:
        if len(text) <= length or len(held_out) < length * windows:
            raise ValueError(
                f"{len(text):,} tokens to train on and {len(held_out):,} held out: rows of {length} tokens, and "
                f"{windows} held-out ones, need more text"
            )
        self.load_model, self.length, self.windows, self.name = load, length, windows, name
        self.text, self.kept = torch.tensor(text), torch.tensor(held_out)
        self.start = [] if start is None else [start]

    @classmethod
    def of_python(cls, load: Callable[[], Any], tokenizer: Any, length: int, windows: int) -> TextTask:
        """The sources and help topics that come with Python; whole documents are held out."""
        from attn_plugins.training.small_llama import corpus
        from attn_plugins.training.small_llama.tokenizer import tokenize

        text, kept = (_bare(tokenize(tokenizer, corpus.texts(split)), tokenizer) for split in ("train", "held_out"))
        return cls(load, text, kept, length, windows, start=tokenizer.bos_token_id, name="Python's own texts")

    @classmethod
    def of_domain(cls, load: Callable[[], Any], tokenizer: Any, domain: str, length: int, windows: int) -> TextTask:
        """Python's own code, or prose (`small_llama.domains`); whole documents are held out."""
        from attn_plugins.training.small_llama.domains import domain_texts
        from attn_plugins.training.small_llama.tokenizer import tokenize

        text, kept = (_bare(tokenize(tokenizer, domain_texts(domain, s)), tokenizer) for s in ("train", "held_out"))
        return cls(load, text, kept, length, windows, start=tokenizer.bos_token_id, name=f"Python's own {domain}")

    @classmethod
    def of_files(
        cls, load: Callable[[], Any], tokenizer: Any, paths: Sequence[Path], length: int, windows: int
    ) -> TextTask:
        """Text files of your own in one row, of which the last tenth is held out."""
        ids: list[int] = []
        for path in paths:
            text = path.read_text(encoding="utf-8", errors="replace")
            ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        cut = int(len(ids) * (1 - HELD_OUT))
        name = f"{len(paths)} text files"
        return cls(load, ids[:cut], ids[cut:], length, windows, start=tokenizer.bos_token_id, name=name)

    def load(self) -> Any:
        return self.load_model()

    def batch(self, numbers: range, seed: int) -> torch.Tensor:
        room = len(self.text) - self.length
        places = [int(torch.randint(room, (), generator=seeded(seed, "row", number))) for number in numbers]
        return torch.stack([self._row(self.text, place) for place in places])

    def held_out(self, number: int) -> torch.Tensor:
        return self._row(self.kept, number % self.windows * (len(self.kept) // self.windows))[None]

    def _row(self, text: torch.Tensor, place: int) -> torch.Tensor:
        return torch.cat([torch.tensor(self.start, dtype=text.dtype), text[place : place + self.length]])

    def losses(self, model: Any, batch: torch.Tensor) -> torch.Tensor:
        """Nats a token."""
        logits = model(**self.inputs(batch)).logits.float()
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), batch[:, 1:], reduction="none").mean(1)

    def inputs(self, batch: torch.Tensor) -> Mapping[str, Any]:
        return {"input_ids": batch, "use_cache": False}

    def moved(self, batch: torch.Tensor, device: torch.device) -> torch.Tensor:
        return batch.to(device)

    def __repr__(self) -> str:
        return f"{self.name}, {len(self.text):,} tokens in rows of {self.length}"


def _bare(ids: list[int], tokenizer: Any) -> list[int]:
    """Without the tokens that begin texts: each row gets its own."""
    return [token for token in ids if token != tokenizer.bos_token_id]
