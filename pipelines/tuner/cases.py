"""Which cases profile, which choose, and which are reported: never the same ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attn_plugins.pipelines.tuner.diffusion import Call


@dataclass(frozen=True)
class Cases:
    """`calibration`: what the profile is made of; `validation`: what chooses; `test`: what is reported."""

    calibration: Any
    validation: list[Any]
    test: list[Any]


def of_prompts(prompts: Sequence[str], seeds: int, call: Callable[[str], Mapping[str, Any]]) -> Cases:
    """The first prompt calibrates; of the others the first half chooses, with one seed, and the rest is reported, with
    `seeds` seeds each. Of one prompt, or two, other seeds stand in for other prompts.

    call: a prompt to the arguments of the pipeline's call.

    Raises:
        ValueError: no prompts, or no seeds.
    """
    if not prompts or seeds < 1:
        raise ValueError(f"{len(prompts)} prompts, {seeds} seeds: give one or more of each")
    others = list(prompts[1:]) or list(prompts)
    half = -(-len(others) // 2)
    chosen, reported = others[:half], others[half:] or others
    first = 100  # seeds of the reported runs: no other run has them
    validation = [Call(call(prompt), 1 + number, prompt) for number, prompt in enumerate(chosen)]
    if len(validation) == 1:
        validation.append(Call(call(chosen[0]), 2, chosen[0]))
    test = [Call(call(prompt), first + seed, prompt) for prompt in reported for seed in range(seeds)]
    return Cases(Call(call(prompts[0]), 0, prompts[0]), validation, test)


def of_text(ids: Sequence[int], tokens: int, rows: int, start: int) -> Cases:
    """Rows (tokens,) from a text, each behind a start token, spread evenly and without overlap: one calibrates, a third
    of the others chooses (two at least), the rest is reported.

    Raises:
        ValueError: a text too short for them.
    """
    if rows < 4 or len(ids) < rows * (tokens - 1):
        raise ValueError(
            f"{rows} rows of {tokens} tokens from a text of {len(ids)}: give four rows or more, and text for them"
        )
    stride = len(ids) // rows
    cut = [torch.tensor([start, *ids[row * stride : row * stride + tokens - 1]]) for row in range(rows)]
    choose = max(2, (rows - 1) // 3)
    return Cases(cut[0], cut[1 : 1 + choose], cut[1 + choose :])
