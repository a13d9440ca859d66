"""Tokens a second in generation, dense with a growing cache and with a static one, and with a plan's own caches.

What is timed is `generate` less `generate` of one token, so prefill and set-up fall out. The three take turns.
"""

from __future__ import annotations

import contextlib
import statistics
from dataclasses import dataclass
from typing import Any

import torch

from attn_plugins.methods.moa import SpanPlan
from attn_plugins.patching import patched
from attn_plugins.pipelines.stopwatch import now


@dataclass(frozen=True)
class Decoding:
    """`rates`: {cache: tokens a second, median}; `bytes`: {cache: of K and V at the end}, for one row of `length`."""

    length: int
    rates: dict[str, float]
    bytes: dict[str, int]


def decoding(model: Any, plan: SpanPlan, prompt: torch.Tensor, *, tokens: int = 64, rounds: int = 3) -> Decoding:
    """Generate `tokens` tokens after `prompt` (1, n), greedily, in each of three ways, `rounds` times in turn.

    Raises:
        ValueError: fewer than 2 tokens or no rounds; whatever `patch` raises for this plan.
    """
    if tokens < 2 or rounds < 1:
        raise ValueError(f"tokens={tokens}, rounds={rounds}: give 2 or more tokens, 1 or more rounds")
    seconds: dict[str, list[float]] = {"dynamic": [], "static": [], "plan": []}
    for turn in range(rounds + 1):
        for name, taken in seconds.items():
            options = {"cache_implementation": "static", "disable_compile": True} if name == "static" else {}
            context = patched(model, "moa", plan=plan) if name == "plan" else contextlib.nullcontext()
            with context:
                each = _generate(model, prompt, tokens, options) - _generate(model, prompt, 1, options)
            if turn:  # the first round warms up
                taken.append(each)
    n = prompt.shape[1] + tokens
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    entry = 2 * width * next(model.parameters()).element_size()
    own = plan.fitted(model.config)
    dense = own.layers * own.kv_heads * n * entry
    kept = {"dynamic": dense, "static": dense, "plan": int(own.cache_lengths(n).sum()) * entry}
    rates = {name: (tokens - 1) / max(statistics.median(taken), 1e-9) for name, taken in seconds.items()}
    return Decoding(n, rates, kept)


@torch.inference_mode()
def _generate(model: Any, prompt: torch.Tensor, tokens: int, options: dict[str, Any]) -> float:
    """Seconds."""
    mask = torch.ones_like(prompt)
    start = now(prompt.device)
    model.generate(
        prompt, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
        pad_token_id=0, **options,
    )  # fmt: skip
    return now(prompt.device) - start
