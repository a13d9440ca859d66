"""How well a language model foresees held-out text, by position, and finds values, by length and depth."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from attn_plugins.training.small_llama.retrieval import FORMATS, Retrieval


@torch.inference_mode()
def text_losses(model: Any, text: Sequence[int], length: int, rows: int, start: int = 0) -> torch.Tensor:
    """Loss of every token in `rows` windows spread evenly over a text: (rows, length) in nats.

    Every window stands behind a start token, so column p holds predictions from p + 1 tokens, of which p are text.
    text: ids. Windows do not overlap as long as rows * length <= len(text). Raises ValueError if one does not fit.
    """
    if len(text) < length or rows < 1:
        raise ValueError(f"{rows} windows of {length} tokens from a text of {len(text)}: give a longer text")
    losses = []
    for row in range(rows):
        at = row * (len(text) - length) // max(rows - 1, 1)
        ids = torch.tensor([start, *text[at : at + length]], device=model.device)
        logits = model(ids[None, :-1], use_cache=False).logits[0].float()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").cpu())
    return torch.stack(losses)


def perplexity(losses: torch.Tensor) -> tuple[float, float, float]:
    """Perplexity of losses (rows, length) with its 95 % interval, from the spread between rows (two at least)."""
    means = losses.double().mean(dim=1)
    mean, half = means.mean().item(), 1.96 * means.std().item() / math.sqrt(len(means))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


@torch.inference_mode()
def retrieval_accuracy(
    model: Any, tasks: Retrieval, length: int, depth: float, trials: int, *, seed: int = 0, **options: Any
) -> float:
    """Share of needle prompts (`Retrieval.needle`) whose whole value is the most probable continuation.

    length: of the prompt, in tokens. depth: 0 to 1. options: others, layout. Training never draws from these seeds.
    """
    found = 0
    for trial in range(trials):
        rng = random.Random(f"needle {seed} {length} {depth} {trial}")
        prompt, answer = tasks.needle(length, depth, rng, **options)
        ids = torch.tensor([prompt + answer], device=model.device)
        # decides as greedy generation does: a value counts only if each of its tokens is the first choice
        guesses = model(ids[:, :-1], use_cache=False, logits_to_keep=len(answer)).logits[0].argmax(-1)
        found += guesses.tolist() == answer
    return found / trials


def report(model: Any, tokenizer: Any, text: Sequence[int], *, windows: int = 24, trials: int = 40) -> str:
    """Markdown tables of held-out text: perplexity by length and position, retrieval by length and depth, by layout.

    text: held-out ids. windows: of text per length. trials: needle prompts per cell.
    """
    tasks, lengths, depths = Retrieval(tokenizer, text), (512, 1024, 2048, 4096), (0.0, 0.25, 0.5, 0.75, 1.0)
    edges = (0, 64, 256, 512, 1024, 2048, 4096)
    lines = ["| window | perplexity (95 %) | " + " | ".join(f"{a}-{b}" for a, b in pairwise(edges)) + " |"]
    lines.append("|---" * (len(edges) + 1) + "|")
    for length in lengths:
        losses = text_losses(model, text, length, windows, tokenizer.bos_token_id)
        parts = [f"{losses[:, a:b].mean().exp():.2f}" if b <= length else "" for a, b in pairwise(edges)]
        lines.append("| {} | {:.2f} ({:.2f}-{:.2f}) | ".format(length, *perplexity(losses)) + " | ".join(parts) + " |")
    lines += ["", "| prompt | " + " | ".join(f"depth {depth}" for depth in depths) + " |", "|---" * 6 + "|"]
    for length in lengths:
        found = [retrieval_accuracy(model, tasks, length, depth, trials) for depth in depths]
        lines.append(f"| {length} | " + " | ".join(f"{share:.2f}" for share in found) + " |")
    lines += ["", "| layout | " + " | ".join(map(str, lengths)) + " |", "|---" * 5 + "|"]
    for layout in FORMATS:
        found = [retrieval_accuracy(model, tasks, length, 0.5, trials, layout=layout) for length in lengths]
        lines.append(f"| {layout} | " + " | ".join(f"{share:.2f}" for share in found) + " |")
    return "\n".join(lines) + "\n"
