"""What spans are searched and judged on: records in running text, questions for them, and the dense model's answers.

Long dependencies and the model's own answers are what makes a search find them: with plain text, or answers written by
others, the paper's plans lose most of retrieval (arXiv 2406.14909, section 5 and table 6).
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from attn_plugins.training.small_llama import corpus
from attn_plugins.training.small_llama.retrieval import ANSWER_WEIGHT, Retrieval
from attn_plugins.training.small_llama.tokenizer import tokenize

SHARES = (0.05, 0.3)  # of a row's tokens that are records and questions
VALIDATED = 0.25  # share of the text kept from calibration that chooses the plan; the rest is for the evaluation


class Row(NamedTuple):
    """`ids` (1, N) int64; `answers` (N,) bool: the tokens that answer a question."""

    ids: torch.Tensor
    answers: torch.Tensor


@dataclass(frozen=True)
class Texts:
    """Ids of three texts that share nothing: to calibrate, to choose among plans, to judge the chosen one."""

    calibration: list[int]
    validation: list[int]
    test: list[int]

    @classmethod
    def of_python(cls, tokenizer: Any) -> Texts:
        """The standard library's texts: the training split calibrates, the held-out documents do the rest."""
        held_out = tokenize(tokenizer, corpus.texts("held_out"))
        cut = int(VALIDATED * len(held_out))
        some = corpus.texts("train")[::8]  # 400,000 tokens, far more than a profile reads
        return cls(tokenize(tokenizer, some), held_out[:cut], held_out[cut:])

    @classmethod
    def of_files(cls, tokenizer: Any, paths: Sequence[Path]) -> Texts:
        """Text files of your own, in one row: the first half calibrates, the next eighth validates, the rest tests."""
        ids = tokenize(tokenizer, [path.read_text(encoding="utf-8", errors="replace") for path in paths])
        half, eighth = len(ids) // 2, int(VALIDATED * (len(ids) - len(ids) // 2))
        return cls(ids[:half], ids[half : half + eighth], ids[half + eighth :])


def tasks_for(tokenizer: Any, text: Sequence[int]) -> Retrieval:
    """Retrieval rows for any fast tokenizer whose vocabulary has words.

    Raises:
        ValueError: a slow tokenizer, or one with fewer than 100 lower-case words that are one token.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError(f"{type(tokenizer).__name__} is a slow tokenizer: load a fast one (tokenizer.json)")
    tasks = Retrieval(tokenizer, text)
    tasks.words = sorted({token[1:] for token in tokenizer.get_vocab() if re.fullmatch("[Ġ▁][a-z]{3,}", token)})
    if len(tasks.words) < 100:
        raise ValueError(f"the tokenizer has {len(tasks.words)} lower-case words of one token: 100 are needed for keys")
    if tasks.start is None:  # a model without a token that begins texts: any special one, as its first is a sink
        tasks.start = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    return tasks


def retrieval_row(tasks: Retrieval, length: int, seed: str) -> Row:
    """A row of `length` tokens, drawn from `seed` alone."""
    rng = random.Random(seed)
    while True:
        ids, weights = tasks.row(length, rng.uniform(*SHARES), rng)
        answers = torch.tensor(weights) == ANSWER_WEIGHT
        if bool(answers.any()):  # in a short row, the first record may be too long
            return Row(torch.tensor([ids]), answers)


def own_answer_loss(logits: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Mean loss over the answers' tokens, the right ones being the model's own first choices: nats a token.

    logits: (1, N, vocabulary) of the dense model. answers: (N,) bool.
    """
    chosen = logits[0, :-1][answers[1:].to(logits.device)].float()
    return torch.nn.functional.cross_entropy(chosen, chosen.detach().argmax(-1))
