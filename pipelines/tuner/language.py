"""A causal language model as what is tuned: its cases are rows of tokens, its result what it foresees at each."""

from __future__ import annotations

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

    @torch.no_grad()
    def run(self, case: torch.Tensor) -> Ran:
        """case: ids (N,)."""
        ids = case[None].to(self.device)
        start = now(self.device)
        logits = self.obj(input_ids=ids, use_cache=False).logits[0]
        seconds = now(self.device) - start
        return Ran(_foreseen(logits), seconds, 1)

    def record(self, case: torch.Tensor, count: int) -> tuple[Ran, list[Probe]]:
        """count: parts of nothing: one forward is all that there is."""
        ran = self.run(case)
        self.grid = (len(case),)
        kwargs = {"input_ids": case[None].to(self.device), "use_cache": False}
        return ran, [Probe(self.obj, (), kwargs, 0.5, ran.result)]

    def again(self, probe: Probe) -> torch.Tensor:
        with torch.no_grad():
            return _foreseen(first_tensor(probe.root(**probe.kwargs).logits)[0])

    def loss(self, result: torch.Tensor, dense: torch.Tensor) -> float:
        return float((dense.exp() * (dense - result)).sum(-1).mean())

    def error(self, output: torch.Tensor, dense: torch.Tensor) -> float:
        return max(self.loss(output, dense), 0.0)


def _foreseen(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (positions, vocabulary) of a row's logits (N, vocabulary), the positions thinned out evenly."""
    tokens = logits.shape[0]
    at = torch.linspace(0, tokens - 1, min(POSITIONS, tokens)).long()
    return logits[at.to(logits.device)].float().log_softmax(-1)
