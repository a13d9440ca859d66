"""GNA in causal language models: a 1-D window over what has been said so far, with caches and padded prompts.

The rule of arXiv 2504.16922 (section 3) on one causal axis, on positions counted from an item's first real token. A
text grows while it is generated, so its length is no part of the rule: a stride group counts as whole before it is,
that is, `start = max(g + s - k, 0)`. Prefill, chunks of it and cached steps then give the same rows at any stride and
dilation. At stride 1 length plays no part anyway, and a window as long as the text is dense attention; above, a window
must reach the end of the last group for that.

Learned sinks are one more score of each row, which gives nothing: with the row's own log-sum-exp, the output times
`sigmoid(lse - sink)`. Capped scores (Gemma 2) leave no kernel to use: their rows are scored a tile at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from attn_plugins.method import AttentionCall, Kept, Processor
from attn_plugins.methods.gna_causal_tiles import Score, attention, plain_keys, tiled
from attn_plugins.ops import neighborhood_attention
from attn_plugins.sequence import Sequence


@dataclass(frozen=True)
class CausalRule:
    """One causal axis: `window` keys per dilation class (-1: all), in groups of `stride`."""

    window: int
    stride: int
    dilation: int

    def __post_init__(self) -> None:
        if self.dilation < 1 or self.stride < 1 or self.window < -1 or self.window == 0:
            raise ValueError(
                f"window={self.window}, stride={self.stride}, dilation={self.dilation}: legal are windows of 1 and "
                "more, or -1 for the whole text, strides of 1..window, dilations of 1 and more"
            )
        if self.window != -1 and self.stride > self.window:
            raise ValueError(f"stride={self.stride}: legal is 1..{self.window}, the window")

    @property
    def reach(self) -> int:
        """How many tokens back the farthest key is."""
        return (self.window - 1) * self.dilation

    def within(self, keys: int, limit: int | None) -> CausalRule:
        """The same rule for `keys` keys, of which the model itself shows the last `limit`; its window is finite."""
        whole = -(-keys // (self.stride * self.dilation)) * self.stride
        if self.window == -1:
            rule = CausalRule(-(-keys // self.dilation), 1, self.dilation)
        else:
            rule = CausalRule(min(self.window, whole), self.stride, self.dilation)
        if limit is not None and limit <= rule.reach:  # only at stride 1: see CausalWindowProcessor.refuses
            rule = CausalRule((limit - 1) // self.dilation + 1, 1, self.dilation)
        return rule

    def shows_all(self, tokens: int) -> bool:
        """Whether the rule is plain causal attention on a text of so many tokens."""
        return self.dilation == 1 and -(-tokens // self.stride) * self.stride <= self.window

    def first_key(self, position: int) -> int:
        """The first key that the query at `position` sees."""
        index, residue = divmod(position, self.dilation)
        start = max(index // self.stride * self.stride + self.stride - self.window, 0)
        return start * self.dilation + residue

    def sees(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Which query positions see which key positions, broadcast; negative keys are the caller's to hide."""
        back = query - key
        seen = (back >= 0) & (back <= self.reach)
        if self.dilation > 1:
            seen &= back % self.dilation == 0
        if self.stride > 1:
            index = torch.div(query, self.dilation * self.stride, rounding_mode="floor") * self.stride
            seen &= torch.div(key, self.dilation, rounding_mode="floor") >= index + self.stride - self.window
        return seen


class CausalWindowProcessor(Processor):
    """GNA at sites of kind "causal". Takes `window`, `stride`, `dilation` (one value, or a tuple of one) and `backend`
    from the config; an axis of a language model is causal whatever `causal` says, and shorter texts are never an error.

    Raises:
        ValueError: a setting of more than one axis or per head, `base_size`, or an illegal value.
    """

    def __init__(self, config: Any) -> None:
        self.rule = CausalRule(*(_single(name, getattr(config, name)) for name in ("window", "stride", "dilation")))
        if getattr(config, "base_size", None) is not None:
            raise ValueError(f"base_size={config.base_size}: a text has no base size to scale from; leave it out")
        if getattr(config, "per_head", ()):
            raise ValueError(f"per_head={config.per_head}: in language models all heads of a layer have one window")
        self.backend = getattr(config, "backend", "auto")

    def refuses(self, call: AttentionCall) -> str | None:
        if call.mask is not None:
            return "the model passes an attention mask of its own making (4-D, packed sequences or blocks)"
        if call.dropout:
            return "attention dropout is on"
        if call.sinks is not None and call.sinks.shape != call.q.shape[1:2]:
            return f"sinks of shape {tuple(call.sinks.shape)} for {call.q.shape[1]} heads"
        if not call.causal:
            return "this attention is not causal"
        if call.sliding_window is not None and self.rule.stride > 1:
            return "a sliding window of the model's own, whose cache forgets where the groups of a stride above 1 begin"
        return None

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        queries, keys = call.q.shape[2], call.k.shape[2]
        rule = self.rule.within(keys, call.sliding_window)
        score = Score(call.scale, call.softcap, call.sinks)
        if call.keys is not None:
            return tiled(call.q, call.k, call.v, call.keys, rule, score)
        if call.softcap is not None:
            return tiled(call.q, call.k, call.v, plain_keys(call.q, call.k), rule, score)
        if queries == keys:
            return self._prefill(call.q, call.k, call.v, rule, score)
        return self._cached(call.q, call.k, call.v, rule, score)

    def kept(self, call: AttentionCall, rows: torch.Tensor) -> Kept:
        where = call.keys or plain_keys(call.q, call.k)
        position = where.first[:, None] + rows.to(call.q.device)
        rule = self.rule.within(call.k.shape[2], call.sliding_window)
        seen = rule.sees(position[:, :, None], where.positions[:, None])
        return Kept(torch.arange(call.k.shape[2], device=call.q.device), seen[:, None])

    def density(self, sequence: Sequence) -> float:
        """Share of the dense causal pairs."""
        n = sequence.length
        rule = self.rule.within(n, None)
        seen = sum((i - rule.first_key(i)) // rule.dilation + 1 for i in range(n))
        return 2 * seen / (n * (n + 1))

    def _prefill(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: CausalRule, score: Score
    ) -> torch.Tensor:
        """All rows: the operator, on a length that fills the last group (its rows see nothing of the filling)."""
        tokens = q.shape[2]
        sinks = score.sinks
        if rule.shows_all(tokens) and sinks is None:
            grouped = q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=score.scale, enable_gqa=grouped)
        filling = -tokens % (rule.stride * rule.dilation)
        if filling:
            q, k, v = (F.pad(t, (0, 0, 0, filling)) for t in (q, k, v))
        found = neighborhood_attention(
            q, k, v, grid=(tokens + filling,), window=rule.window, stride=rule.stride, dilation=rule.dilation,
            causal=True, scale=score.scale, backend=self.backend, return_lse=sinks is not None,
        )  # fmt: skip
        out, lse = (found, None) if isinstance(found, torch.Tensor) else found
        if sinks is not None:
            assert lse is not None  # it was asked for
            out = out * torch.sigmoid(lse - sinks[:, None])[..., None].to(out.dtype)
        return out[:, :, :tokens] if filling else out

    def _cached(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: CausalRule, score: Score
    ) -> torch.Tensor:
        """The last rows: of the keys, only those that one of them sees."""
        queries, keys = q.shape[2], k.shape[2]
        position = keys - queries
        if queries == 1:
            seen = slice(rule.first_key(position), keys, rule.dilation)
            return attention(q, k[:, :, seen], v[:, :, seen], None, score)
        unit = rule.stride * rule.dilation
        first = max(position - rule.reach, 0) // unit * unit  # groups and classes begin where they began
        k, v, position, keys = k[:, :, first:], v[:, :, first:], position - first, keys - first
        if queries > rule.reach:  # at least half of the operator's rows are wanted
            return self._prefill(F.pad(q, (0, 0, position, 0)), k, v, rule, score)[:, :, position:]
        at = torch.arange(keys, device=q.device)
        return attention(q, k, v, rule.sees(at[position:, None], at)[None, None], score)


def _single(name: str, value: Any) -> int:
    """An int, or a tuple that holds one."""
    if isinstance(value, (tuple, list)) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={value!r}: a language model has one axis; give one int (or a tuple of one)")
    return value
