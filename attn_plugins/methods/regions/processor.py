"""Regions at a kind of layer: what the conditional batch items see; the others keep what they saw."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from attn_plugins.method import AttentionCall, SiteKind
from attn_plugins.methods.regions.config import Embedding, RegionsConfig
from attn_plugins.methods.regions.layout import RegionLayout
from attn_plugins.methods.regions.plans import Call, attend, plan_of, region_shares
from attn_plugins.ops.block_sparse.reference import masked_attention
from attn_plugins.ops.checks import check_qkv, choose_backend, kernel_refusal, resolve_scale
from attn_plugins.prompts import PromptProcessor, Prompts, TextParts
from attn_plugins.sequence import Sequence

Qkv = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class RegionsProcessor(PromptProcessor):
    """Regions at the layers of one kind."""

    def __init__(self, config: RegionsConfig, kind: SiteKind, layout: RegionLayout) -> None:
        self.config = config
        self.kind = kind
        self.layout = layout
        prompts = (row.prompt for row in config.regions)
        self.prompts = Prompts(
            tuple(prompt.values if isinstance(prompt, Embedding) else prompt for prompt in prompts),
            config.guidance, config.max_sequence_length,
        )  # fmt: skip

    def refuses(self, call: AttentionCall) -> str | None:
        if call.parts is None:
            return "the layer was called outside of its model's forward, so no prompts have joined its text"
        return super().refuses(call)

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        parts, sequence = call.parts, call.sequence
        assert parts is not None  # refuses
        qkv = (call.q, call.k, call.v)
        scale = resolve_scale(call.scale, call.q.shape[-1])
        if self.kind == "cross" and call.k.shape[2] != parts.length:
            return _dense(qkv, scale)  # of an image prompt, which all see
        check_qkv(*qkv)
        what = self._what(call.q.shape[2], parts, sequence)
        first, last = parts.rows
        pieces = [(slice(0, first), False), (slice(first, last), True), (slice(last, call.q.shape[0]), False)]
        found = []
        for items, conditional in pieces:
            if items.start < items.stop:
                mine = (call.q[items], call.k[items], call.v[items])
                found.append(self._conditional(mine, what, scale) if conditional else _plain(mine, what, scale))
                if conditional and call.watch is not None and what.lengths:
                    call.watch.take(prompt_shares(mine[0], mine[1], what, scale), sequence)
        return found[0] if len(found) == 1 else torch.cat(found)

    def _what(self, tokens: int, parts: TextParts, sequence: Sequence | None) -> Call:
        """What the call is, of all prompts.

        Raises:
            ValueError: the family cannot tell which token of the picture is where.
        """
        if sequence is None or (self.kind != "joint" and tokens != sequence.tokens):
            grid = "an unknown grid" if sequence is None else f"a grid of {sequence.tokens}"
            raise ValueError(f"regions: {tokens} tokens of {grid}: where they are in the picture is not known")
        own = self.config.self_attention == "masked"
        if self.kind == "joint":
            return Call.joint(sequence, parts.lengths, own)
        return Call(sequence.grid, parts.lengths if self.kind == "cross" else (), self.kind == "cross")

    def _conditional(self, qkv: Qkv, what: Call, scale: float) -> torch.Tensor:
        hard = self.config.mode == "masked" or not what.lengths
        if hard or (not torch.compiler.is_compiling() and self.layout.is_hard(what.grid)):
            return self._attend(qkv, what, scale)
        out = None
        for number, share in enumerate(self._shares(qkv[0], what.grid)):
            one = what.of(number)
            row = self._attend(qkv, one, scale) * _along(share, one, qkv[0].shape[2])[:, None]
            out = row if out is None else out + row
        assert out is not None  # there is prompt 0
        return out.to(qkv[0].dtype)

    def _attend(self, qkv: Qkv, what: Call, scale: float) -> torch.Tensor:
        q, k, v = qkv
        backend = choose_backend(self.config.backend, q.device, kernels=True, refusal=kernel_refusal(q))
        if backend == "reference":
            return masked_attention(q, k, v, plan_of(self.layout, what).to_mask().to(q.device), scale)[0]
        return attend(q, k, v, scale, what.encode(self.layout), backend)[0]

    def _shares(self, q: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return region_shares(q.detach(), self.layout.key, self.layout.count, list(grid))
        return self.layout.shares(grid, q.device)

    def density(self, sequence: Sequence) -> float:
        """Of self-attention. With text it depends on the prompts' lengths, and is told as dense attention's."""
        if self.kind != "self":
            return 1.0
        return plan_of(self.layout, Call(sequence.grid)).density


def _along(share: torch.Tensor, what: Call, tokens: int) -> torch.Tensor:
    """(N,): the share of the plan's prompt in each token of the grid; 1 for the rest, which is in one plan alone."""
    if what.cross:
        return share
    first = sum(what.lengths) if what.before else 0
    return F.pad(share, (first, tokens - first - share.shape[0]), value=1.0)


def _plain(qkv: Qkv, what: Call, scale: float) -> torch.Tensor:
    """Attention as if the text were prompt 0 alone. Tokens of other prompts give 0."""
    if not what.lengths:
        return _dense(qkv, scale)
    q, k, v = qkv
    own, length = what.lengths[0], sum(what.lengths)
    if what.cross:
        return _dense((q, k[:, :, :own], v[:, :, :own]), scale)
    tokens = q.shape[2]
    start = 0 if what.before else tokens - what.others - length  # of the text
    cut = [slice(0, start + own), slice(start + length, tokens)]
    kept = tuple(torch.cat([t[:, :, part] for part in cut], dim=2) for t in (q, k, v))
    out = _dense(kept, scale)  # type: ignore[arg-type]
    gap = out.new_zeros(*out.shape[:2], length - own, out.shape[3])
    return torch.cat([out[:, :, : start + own], gap, out[:, :, start + own :]], dim=2)


def _dense(qkv: Qkv, scale: float) -> torch.Tensor:
    q, k, v = qkv
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def prompt_shares(q: torch.Tensor, k: torch.Tensor, what: Call, scale: float) -> torch.Tensor:
    """(B, R, N): of the attention that a token of the grid would pay to all prompts if it saw them all, the part that
    goes to each region's; the mean over heads. For recording: a head at a time, and no memory of N x N."""
    first = sum(what.lengths) if what.before else 0
    text = 0 if what.cross or what.before else q.shape[2] - what.others - sum(what.lengths)
    tokens = q.shape[2] - (0 if what.cross else sum(what.lengths) + what.others)
    group = q.shape[1] // k.shape[1]
    total = None
    for head in range(q.shape[1]):
        rows, columns = q[:, head, first : first + tokens].float(), k[:, head // group].float()
        each = columns[:, text : text + sum(what.lengths)].split(list(what.lengths), dim=1)
        masses = [torch.logsumexp(rows @ one.mT * scale, dim=-1) for one in each]
        share = torch.softmax(torch.stack(masses, dim=1), dim=1)
        total = share if total is None else total + share
    assert total is not None  # a layer has heads
    return total[:, 1:] / q.shape[1]
