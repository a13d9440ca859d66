"""MoH at a layer: gates from its input or its queries, and attention of the heads that they leave."""

from __future__ import annotations

from typing import Any

import torch

from attn_plugins.method import AttentionCall, Processor
from attn_plugins.methods.moh.attention import attend, real_tokens
from attn_plugins.methods.moh.config import MoHConfig
from attn_plugins.methods.moh.gates import Routing, hard, in_heads, query_norms
from attn_plugins.sequence import Sequence


class MoHProcessor(Processor):
    """Heads chosen per token. Of learned and ridge routers, `prepare` gives the `Routing` of the layer's input before
    its projections run; it is in `call.prepared`, and with it the gates that every head of the call has."""

    measure = "share of heads"

    def __init__(self, config: MoHConfig) -> None:
        self.config = config
        self.prepares = config.router != "query_norm"
        self.skip = config.active != 1.0  # with all heads there is nothing to leave out
        self.skips_projections = config.skip_projections and self.skip

    def prepare(self, x: torch.Tensor, weights: Any) -> Any:
        return None if weights is None else weights(x)

    def refuses(self, call: AttentionCall) -> str | None:
        if call.mask is not None:
            return "the model passes an attention mask that routed heads cannot honour"
        if call.dropout:
            return "attention dropout is on"
        if call.causal != (call.kind == "causal"):
            return "a site that is causal in one call and not in another"
        beyond = call.keys is not None or call.sliding_window is not None or call.softcap is not None
        if not call.causal and (beyond or call.sinks is not None):
            return "padded prompts, caches, windows, capped scores and sinks are honoured in causal attention alone"
        if call.sinks is not None and call.sinks.shape != call.q.shape[1:2]:
            return f"sinks of shape {tuple(call.sinks.shape)} for {call.q.shape[1]} heads"
        sequence = call.sequence
        if not call.causal and sequence is not None and sequence.valid_before != sequence.text_before:
            return "padding before the grid"
        if not self.prepares:
            split = call.layer_heads not in (None, call.q.shape[1])
            return "query norms choose among all heads, of which each device holds a part" if split else None
        if call.weights is None:
            return "this layer has lost its router: patch the model again"
        if call.prepared is None:
            return "what enters this layer was not seen, or is no row of tokens for each item"
        if tuple(call.prepared.tokens) != (call.q.shape[0], call.q.shape[2]):
            return f"{call.q.shape[2]} queries of a layer whose input has {call.prepared.tokens[1]} tokens"
        return None

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        routing = call.prepared if self.prepares else self.by_norm(call)
        gates = routing.gates
        if call.watch is not None:
            gates = call.watch(gates, routing.share, routing.chosen, real_tokens(call))
        if call.layer_heads is not None:
            gates = gates[..., call.first_head : call.first_head + call.q.shape[1]]
        return attend(
            call, gates, skip=self.skip, backend=self.config.backend,
            dense_backward=not self.prepares and gates.requires_grad,  # straight through, unchosen heads too
        )  # fmt: skip

    def by_norm(self, call: AttentionCall) -> Routing:
        """Shared heads first, as the paper has them in LLaMA3-8B; of the others those with the largest queries."""
        budget = self.config.budget(call.q.shape[1], call.q.shape[1] // call.k.shape[1])
        scores = query_norms(call.q, budget.group)[..., budget.shared :]
        gates, share, chosen = hard(scores, budget.routed, budget.shared, straight_through=True)
        return Routing(in_heads(gates, None, budget.group), share, chosen, budget.group)

    def density(self, sequence: Sequence) -> float:
        """Share of the heads that a token gets, mean over the layers."""
        return float(self.config.active)
