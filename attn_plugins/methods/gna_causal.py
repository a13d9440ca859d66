"""GNA in causal language models: a 1-D window over what has been said so far, with caches and padded prompts.

The rule of arXiv 2504.16922 (section 3) on one causal axis, on positions counted from an item's first real token. A
text grows while it is generated, so its length is no part of the rule: a stride group counts as whole before it is,
that is, `start = max(g + s - k, 0)`. Prefill, chunks of it and cached steps then give the same rows at any stride and
dilation. At stride 1 length plays no part anyway, and a window as long as the text is dense attention; above, a window
must reach the end of the last group for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from attn_plugins.method import AttentionCall, CausalKeys, Processor
from attn_plugins.ops import neighborhood_attention
from attn_plugins.sequence import Sequence

TILE = 128, 512  # rows of queries whose keys are sliced together under a mask: at least, at most


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
        if not call.causal:
            return "this attention is not causal"
        if call.sliding_window is not None and self.rule.stride > 1:
            return "a sliding window of the model's own, whose cache forgets where the groups of a stride above 1 begin"
        return None

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        queries, keys = call.q.shape[2], call.k.shape[2]
        rule = self.rule.within(keys, call.sliding_window)
        if call.keys is not None:
            return _padded(call.q, call.k, call.v, call.keys, rule, call.scale)
        if queries == keys:
            return self._prefill(call.q, call.k, call.v, rule, call.scale)
        return self._cached(call.q, call.k, call.v, rule, call.scale)

    def density(self, sequence: Sequence) -> float:
        """Share of the dense causal pairs."""
        n = sequence.length
        rule = self.rule.within(n, None)
        seen = sum((i - rule.first_key(i)) // rule.dilation + 1 for i in range(n))
        return 2 * seen / (n * (n + 1))

    def _prefill(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: CausalRule, scale: float | None
    ) -> torch.Tensor:
        """All rows: the operator, on a length that fills the last group (its rows see nothing of the filling)."""
        tokens = q.shape[2]
        if rule.shows_all(tokens):
            grouped = q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        filling = -tokens % (rule.stride * rule.dilation)
        if filling:
            q, k, v = (F.pad(t, (0, 0, 0, filling)) for t in (q, k, v))
        out = neighborhood_attention(
            q, k, v, grid=(tokens + filling,), window=rule.window, stride=rule.stride, dilation=rule.dilation,
            causal=True, scale=scale, backend=self.backend,
        )  # fmt: skip
        assert isinstance(out, torch.Tensor)  # no LSE was asked for
        return out[:, :, :tokens] if filling else out

    def _cached(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: CausalRule, scale: float | None
    ) -> torch.Tensor:
        """The last rows: of the keys, only those that one of them sees."""
        queries, keys = q.shape[2], k.shape[2]
        position = keys - queries
        if queries == 1:
            seen = slice(rule.first_key(position), keys, rule.dilation)
            return _attention(q, k[:, :, seen], v[:, :, seen], None, scale)
        unit = rule.stride * rule.dilation
        first = max(position - rule.reach, 0) // unit * unit  # groups and classes begin where they began
        k, v, position, keys = k[:, :, first:], v[:, :, first:], position - first, keys - first
        if queries > rule.reach:  # at least half of the operator's rows are wanted
            return self._prefill(F.pad(q, (0, 0, position, 0)), k, v, rule, scale)[:, :, position:]
        at = torch.arange(keys, device=q.device)
        return _attention(q, k, v, rule.sees(at[position:, None], at)[None, None], scale)


def _padded(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, where: CausalKeys, rule: CausalRule, scale: float | None
) -> torch.Tensor:
    """Exact under any padding, without reading a value: tiles of queries, the slots they may see, and a mask for them.

    A query that is padding sees its own slot and whatever else the rule leaves it: finite, and of no consequence.
    """
    queries, keys = q.shape[2], k.shape[2]
    position = where.first[:, None] + torch.arange(queries, device=q.device)
    column = where.column.reshape(()) + torch.arange(queries, device=q.device)
    tile = min(max(rule.reach, TILE[0]), TILE[1])
    outs = []
    for begin in range(0, queries, tile):
        end = min(begin + tile, queries)
        width = rule.reach + end - begin
        slots = torch.arange(keys, device=q.device)
        tile_k, tile_v, key = k, v, where.positions
        inside = None
        if queries == keys:  # then the first query has the first slot
            span = slice(max(begin - rule.reach, 0), end)
            slots, tile_k, tile_v, key = slots[span], k[:, :, span], v[:, :, span], key[:, span]
        elif width < keys:
            slots = column[begin] - rule.reach + torch.arange(width, device=q.device)
            inside = (slots >= 0) & (slots < keys)
            held = slots.clamp(0, keys - 1)
            tile_k, tile_v, key = k.index_select(2, held), v.index_select(2, held), key.index_select(1, held)
        seen = rule.sees(position[:, begin:end, None], key[:, None]) & (key >= 0)[:, None]
        if inside is not None:
            seen &= inside
        seen |= slots == column[begin:end, None]
        outs.append(_attention(q[:, :, begin:end], tile_k, tile_v, seen[:, None], scale))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """SDPA; the query heads of one key head stand as its rows where there is one row each."""
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads != kv_heads and q.shape[2] == 1:
        rows = q.reshape(q.shape[0], kv_heads, heads // kv_heads, q.shape[3])
        return F.scaled_dot_product_attention(rows, k, v, mask, scale=scale).reshape(*q.shape[:3], v.shape[3])
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=heads != kv_heads)


def _single(name: str, value: Any) -> int:
    """An int, or a tuple that holds one."""
    if isinstance(value, (tuple, list)) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={value!r}: a language model has one axis; give one int (or a tuple of one)")
    return value
