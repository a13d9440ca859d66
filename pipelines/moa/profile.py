"""The influence profile of a model: what hiding each block of each head's attention would do, averaged over rows.

It is saved after every row, and a search that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from attn_plugins.patches.attention_probe import output_gradients
from attn_plugins.pipelines.moa.calibration import own_answer_loss, retrieval_row
from attn_plugins.search import block_influence, window_influence
from attn_plugins.training.small_llama.retrieval import Retrieval

Tick = Callable[[str, int], None]  # what was done, and how many tokens of work it was

Measure = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


def silent(what: str, amount: int) -> None:
    """A `Tick` that tells nobody."""


@dataclass
class Profile:
    """Sums over rows. `totals`: {length: (layers, query heads, blocks, blocks)}; `counts`, `losses`: {length: ...}.

    `origin` says what it is a profile of; one of another origin is never added to it.
    """

    origin: str
    totals: dict[int, torch.Tensor] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    losses: dict[int, list[float]] = field(default_factory=dict)

    @property
    def lengths(self) -> list[int]:
        return sorted(self.totals)

    def maps(self, length: int) -> torch.Tensor:
        """(layers, query heads, blocks, blocks): the mean over rows."""
        return self.totals[length] / self.counts[length]

    def save(self, path: Path) -> None:
        """Whole or not at all: an interruption leaves the file before."""
        temporary = path.with_suffix(".tmp")
        torch.save(vars(self), temporary)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> Profile:
        return cls(**torch.load(path, weights_only=True))


def profile(
    model: Any,
    tasks: Retrieval,
    lengths: Sequence[int],
    rows: int,
    path: Path,
    *,
    seed: int = 0,
    influence: str = "windows",
    sink: int = 64,
    block: int = 64,
    tick: Tick = silent,
) -> Profile:
    """Profile `rows` rows of each length, those that `path` holds already not again.

    Args:
        model: a causal language model of transformers on any device, in evaluation mode.
        lengths: tokens.
        influence: "windows" (`search.window_influence`) or "pairs" (`search.block_influence`, the paper's).
        sink, block: tokens.
        path: of the file; its folder is made.
        tick: called after each row.

    Raises:
        ValueError: a file of another origin (model, seed or text), or a model that cannot be probed.
    """
    if influence not in ("windows", "pairs"):
        raise ValueError(f"influence={influence!r}: legal are 'windows' and 'pairs'")
    what = f"windows behind {sink} sinks" if influence == "windows" else "pairs"
    origin = f"{origin_of(model)}, text of {len(tasks.text)}, seed {seed}, {what}, blocks of {block}"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = Profile.load(path) if path.exists() else Profile(origin)
    if found.origin != origin:
        raise ValueError(
            f"{path} is another profile ({found.origin}), not this one ({origin}): give another folder, or delete it"
        )

    def measure(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor, scale: float) -> torch.Tensor:
        if influence == "pairs":
            return block_influence(q, k, v, grad, scale=scale, block=block)
        return window_influence(q, k, v, grad, scale=scale, block=block, sink=sink // block)

    for number in range(rows):
        for length in lengths:
            if number >= found.counts.get(length, 0):
                _add(found, measure, model, tasks, length, f"calibration {seed} {length} {number}")
                found.save(path)
            tick(f"row {number + 1} of {rows}, {length} tokens", length)
    return found


def origin_of(model: Any) -> str:
    """Class, size and a sum over the weights of the output layer: the same model gives the same words."""
    weight = model.get_output_embeddings().weight
    parameters = sum(part.numel() for part in model.parameters())
    return f"{type(model).__name__} of {parameters:,} parameters ({float(weight.detach().double().abs().mean()):.6g})"


def _add(found: Profile, measure: Measure, model: Any, tasks: Retrieval, length: int, seed: str) -> None:
    row = retrieval_row(tasks, length, seed)
    maps: dict[int, torch.Tensor] = {}

    def take(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor, scale: float) -> None:
        maps[layer] = measure(q[0], k[0], v[0], grad[0], scale).cpu()

    loss, layers = output_gradients(
        model, row.ids.to(model.device), lambda logits: own_answer_loss(logits, row.answers), take
    )
    total = torch.stack([maps[layer] for layer in range(layers)])
    found.totals[length] = found.totals.get(length, 0) + total
    found.counts[length] = found.counts.get(length, 0) + 1
    found.losses.setdefault(length, []).append(loss)
