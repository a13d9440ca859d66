"""A causal language model as what is tuned: its cases are rows of tokens, its result what it foresees at each."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from attn_plugins.pipelines.stopwatch import now
from attn_plugins.pipelines.tuner.subject import Probe, Ran, Subject, first_tensor, places_of
from attn_plugins.targets import find

POSITIONS = 512  # of a row, spread evenly: what is kept of its predictions


class LanguageSubject(Subject):
    """Args: model: a causal language model of transformers that is not patched, in evaluation mode."""

    loss_name = "KL to dense, nats a token"
    has_steps = False

    def __init__(self, model: Any) -> None:
        self.obj = model
        self.targets = find(model)
        self.places = places_of(self.targets)
        self.device = next(model.parameters()).device
        self.grid = ()
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.no_grad()
    def run(self, case: torch.Tensor) -> Ran:
        """case: ids (N,)."""
        start = now(self.device)
        logits = self.obj(**self._given(case)).logits[0]
        seconds = now(self.device) - start
        return Ran(self._foreseen(logits), seconds, 1)

    def record(self, case: torch.Tensor, count: int) -> tuple[Ran, list[Probe]]:
        """count: parts of nothing: one forward is all that there is.

        Raises:
            ValueError: a row that is longer than the model has positions.
        """
        most = getattr(self.obj.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and len(case) > most:
            raise ValueError(f"rows of {len(case):,} tokens: this model has positions for {most:,}; give shorter ones")
        self.run(case)  # the first one is slow
        ran = self.run(case)
        self.grid = (len(case),)
        return ran, [Probe(self.obj, (), self._given(case), 0.5, ran.result)]

    def again(self, probe: Probe) -> torch.Tensor:
        with torch.no_grad():
            return self._foreseen(first_tensor(probe.root(**probe.kwargs).logits)[0])

    def _given(self, case: torch.Tensor) -> dict[str, Any]:
        """Arguments of a forward; where the model can, of the logits those alone that are looked at."""
        given = {"input_ids": case[None].to(self.device), "use_cache": False}
        return given | ({"logits_to_keep": _positions(len(case)).to(self.device)} if self._keeps else {})

    def _foreseen(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (positions, vocabulary) of a forward's logits (N or positions, vocabulary)."""
        kept = logits if self._keeps else logits[_positions(len(logits)).to(logits.device)]
        return kept.float().log_softmax(-1)

    def loss(self, result: torch.Tensor, dense: torch.Tensor) -> float:
        return float((dense.exp() * (dense - result)).sum(-1).mean())

    def error(self, output: torch.Tensor, dense: torch.Tensor) -> float:
        return max(self.loss(output, dense), 0.0)


def _positions(tokens: int) -> torch.Tensor:
    """Up to POSITIONS places of a row, spread evenly."""
    return torch.linspace(0, tokens - 1, min(POSITIONS, tokens)).long()
