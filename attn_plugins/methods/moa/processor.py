"""MoA at a layer: spans over whole keys, or over the rings of its cache."""

from __future__ import annotations

from typing import Any

import torch

from attn_plugins.method import AttentionCall, Kept, Processor
from attn_plugins.methods.gna_causal_tiles import Score, plain_keys
from attn_plugins.methods.moa.masked import Rule, masked
from attn_plugins.methods.moa.places import new_tokens, places
from attn_plugins.methods.moa.plan import SpanPlan
from attn_plugins.methods.moa.rule import LayerRule
from attn_plugins.ops import span_attention
from attn_plugins.ops.decode.rings import EMPTY
from attn_plugins.plan.spans import BLOCK
from attn_plugins.sequence import Sequence


class MoAProcessor(Processor):
    """Causal attention with a span per head.

    A call whose `extras` has a "cache" brings new tokens alone: an object that keeps the earlier ones (`rings`, `seen`,
    `fresh`, `commit`; see patches/caches.py). Other calls bring all keys, and `extras["length"]` may tell how long the
    text is to become; else the rule's N is the keys that there are. Calls behind kept tokens leave a "behind" there.
    """

    def __init__(
        self, rule: LayerRule, granularity: str = "token", backend: str = "auto", plan: SpanPlan | None = None
    ) -> None:
        self.span_rule = self.config = rule
        self.grain = BLOCK if granularity == "block" else 1
        self.granularity = granularity
        self.backend = backend
        self.plan = plan

    def fits(self, config: Any) -> None:
        """Whether the plan is for a model of this config.

        Raises:
            ValueError: another shape; the message names both.
        """
        if self.plan is not None:
            self.plan.fitted(config)

    def refuses(self, call: AttentionCall) -> str | None:
        if call.mask is not None:
            return "the model passes an attention mask of its own making (4-D, packed sequences or blocks)"
        if call.dropout:
            return "attention dropout is on"
        if not call.causal:
            return "this attention is not causal"
        if call.sinks is not None and call.sinks.shape != call.q.shape[1:2]:
            return f"sinks of shape {tuple(call.sinks.shape)} for {call.q.shape[1]} heads"
        if call.extras.get("cache") is not None and call.sliding_window is not None:
            return "a layer with a sliding window of the model's own has no ring cache"
        return None

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        cache = call.extras.get("cache")
        if cache is None:
            return self._whole(call)
        if not torch.compiler.is_compiling() and cache.fresh:
            out = self._whole(call)
            cache.commit(call.k, call.v, *_own(call, cache))
            return out
        call.extras["behind"] = True
        if call.q.shape[2] == 1:
            return self._step(call, cache)
        return self._chunk(call, cache)

    def _spans(self, call: AttentionCall) -> tuple[int, ...]:
        if call.extras.get("cache") is not None:
            return call.extras["cache"].rings.spans
        n = call.extras.get("length") or call.k.shape[2]
        return self.span_rule.spans(n, call.q.shape[1], call.first_head, call.layer_heads)

    def _whole(self, call: AttentionCall) -> torch.Tensor:
        """All keys are there, but for those that a sliding window of the model's own hides from all queries."""
        spans, sink, limit = self._spans(call), self.span_rule.sink, call.sliding_window
        score, keys = Score(call.scale, call.softcap, call.sinks), call.k.shape[2]
        waits = call.q.shape[2] > 1 or call.q.device.type == "cpu"  # a lone token is not worth a wait for the GPU
        where = places(call.keys) if call.keys is not None and waits else None
        hidden = max(call.sequence.length - keys, 0) if limit is not None and call.sequence is not None else 0
        whole = not hidden if call.keys is None else where is not None and where.whole
        if limit is not None and limit <= min(spans) and self.grain == 1:  # it hides the sinks too
            spans, sink, limit = (limit,) * len(spans), 0, None
        elif limit is not None and keys <= limit and whole:
            limit = None
        told = call.keys is None or (where is not None and (where.whole or not sink))
        if limit is None and call.softcap is None and told:
            out, lse = span_attention(
                call.q, call.k, call.v, spans=spans, sink=sink, granularity=self.granularity, scale=call.scale,
                query_start=None if where is None else where.start, lengths=None if where is None else where.lengths,
                backend=self.backend, return_lse=True,
            )  # fmt: skip
            return _with_sinks(out, lse, call.sinks)
        queries, positions = _positions(call, hidden)
        rule = Rule(spans, sink, self.grain, limit, call.q.device)
        return masked(call.q, call.k, call.v, queries, positions[:, None], rule, score)

    def _step(self, call: AttentionCall, cache: Any) -> torch.Tensor:
        """One token: it takes its place, and sees what is kept."""
        positions, real = _own(call, cache)
        cache.commit(call.k, call.v, positions, real)
        if call.softcap is not None:
            at = _as_tensor(positions, call)
            held = cache.rings.ordered(at[:, -1] + 1)
            rule = Rule(cache.rings.spans, self.span_rule.sink, 1, None, call.q.device)
            score = Score(call.scale, call.softcap, call.sinks)
            return masked(call.q, held.keys, held.values, at, held.positions, rule, score)
        out, lse = cache.rings.attend(call.q, positions, cache.written, call.scale, self.backend)
        return _with_sinks(out, lse, call.sinks)

    def _chunk(self, call: AttentionCall, cache: Any) -> torch.Tensor:
        """Some tokens behind others. They see what the rings held before they came, and then take their places."""
        rings, count = cache.rings, call.q.shape[2]
        told, real = _own(call, cache)
        positions = _as_tensor(told, call)
        held = rings.ordered(positions[:, 0], cache.written, self.grain)
        k, v = torch.cat([held.keys, call.k], dim=2), torch.cat([held.values, call.v], dim=2)
        own = positions if real is None else torch.where(real, positions, EMPTY)
        lengths = (
            None if torch.compiler.is_compiling() or bool(rings.gaps) else _lengths(held.before, positions, real, k)
        )
        if call.softcap is None and lengths is not None:
            out, lse = span_attention(
                call.q, k, v, spans=rings.spans, sink=self.span_rule.sink, lengths=lengths,
                granularity=self.granularity, scale=call.scale, backend=self.backend, return_lse=True,
            )  # fmt: skip
            out = _with_sinks(out, lse, call.sinks)
        else:
            batch = max(own.shape[0], held.positions.shape[0])
            new = own[:, None].expand(batch, k.shape[1], count)
            keys = torch.cat([held.positions.expand(batch, -1, -1), new], dim=2)
            rule = Rule(rings.spans, self.span_rule.sink, self.grain, None, call.q.device)
            out = masked(call.q, k, v, positions, keys, rule, Score(call.scale, call.softcap, call.sinks))
        cache.commit(call.k, call.v, told, real)
        return out

    def kept(self, call: AttentionCall, rows: torch.Tensor) -> Kept | None:
        if "behind" in call.extras:
            return None
        hidden = 0 if call.sliding_window is None or call.sequence is None else call.sequence.length - call.k.shape[2]
        queries, positions = _positions(call, max(hidden, 0))
        rule = Rule(self._spans(call), self.span_rule.sink, self.grain, call.sliding_window, call.q.device)
        seen = rule.sees(queries[:, None, rows.to(call.q.device), None], positions[:, None, None])
        return Kept(torch.arange(call.k.shape[2], device=call.q.device), seen)

    def density(self, sequence: Sequence) -> float:
        """Share of the dense causal pairs of a prefill, mean over the heads."""
        return self.span_rule.pair_fraction(sequence.length, len(self.span_rule.alphas))


def _own(call: AttentionCall, cache: Any) -> tuple[torch.Tensor | int, torch.Tensor | None]:
    """Positions and realness of the call's own tokens; where shapes tell them, the first position alone."""
    return (cache.seen, None) if call.keys is None else new_tokens(call.keys, call.q.shape[2])


def _as_tensor(positions: torch.Tensor | int, call: AttentionCall) -> torch.Tensor:
    """(1 or B, n)."""
    if isinstance(positions, int):
        return torch.arange(positions, positions + call.q.shape[2], device=call.q.device)[None]
    return positions


def _positions(call: AttentionCall, hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the queries (B, n) and the keys (B, N_kv); `hidden` tokens came before the keys, where only shapes tell."""
    where = call.keys or plain_keys(call.q, call.k)
    first, keys = (
        (where.first, where.positions) if call.keys is not None else (where.first + hidden, where.positions + hidden)
    )
    return first[:, None] + torch.arange(call.q.shape[2], device=call.q.device), keys


def _lengths(
    before: torch.Tensor, positions: torch.Tensor, real: torch.Tensor | None, keys: torch.Tensor
) -> torch.Tensor | None:
    """(B, 2) [padding before, real tokens] of keys with a chunk behind them; None if padding is between. Waits."""
    batch, columns = keys.shape[0], keys.shape[2]
    if real is None:
        before = before.expand(batch)
        return torch.stack([before, columns - before], dim=1)
    count, start = real.sum(-1), (-positions[:, 0]).clamp(0, real.shape[1])  # padding in front comes before position 0
    step = torch.arange(real.shape[1], device=real.device)
    whole = (real == (step >= start[:, None]) & (step < (start + count)[:, None])).all()
    if not bool(whole):
        return None
    return torch.stack([before + start, columns - real.shape[1] - before + count], dim=1)


def _with_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """A learned score beside each row's own takes its share, and gives nothing."""
    if sinks is None:
        return out
    return out * torch.sigmoid(lse - sinks[:, None])[..., None].to(out.dtype)
