"""The rule of regions by definition: who sees whom, pair by pair, and dense attention over that; shares no code."""

from __future__ import annotations

import torch

from attn_plugins.method import AttentionCall
from attn_plugins.methods.regions import RegionLayout, RegionsConfig

GRID, TEXT, OTHER = 0, 1, 2  # what a token is


def tokens_of(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the queries and of the keys: what each is, and its number: which token of the grid, of which prompt."""
    assert call.sequence is not None and call.parts is not None
    grid = torch.arange(call.sequence.tokens)
    text = torch.cat([torch.full((length,), prompt) for prompt, length in enumerate(call.parts.lengths)])
    others = torch.zeros(call.sequence.text_after if call.sequence.text_before else 0, dtype=torch.int64)
    runs = {
        "self": [(GRID, grid)], "cross": [(TEXT, text)],
        "joint": [(TEXT, text), (GRID, grid), (OTHER, others)] if call.sequence.text_before else
                 [(GRID, grid), (TEXT, text)],
    }  # fmt: skip

    def both(rows: list[tuple[int, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([torch.full_like(n, kind) for kind, n in rows]), torch.cat([n for _, n in rows])

    return *both([(GRID, grid)] if call.kind == "cross" else runs[call.kind]), *both(runs[call.kind])


def rule(call: AttentionCall, ids: torch.Tensor, shares: torch.Tensor, own: bool, prompt: int | None) -> torch.Tensor:
    """(queries, keys) bool: of one prompt of couple, or (None) of each token's own."""
    q_kind, q_number, k_kind, k_number = tokens_of(call)
    place = torch.where(q_kind == GRID, q_number, 0)
    q_prompt = torch.where(q_kind == GRID, ids[place] if prompt is None else torch.tensor(prompt), q_number)
    q_id, k_id = ids[place], ids[torch.where(k_kind == GRID, k_number, 0)]
    a, b = q_kind[:, None], k_kind[None]
    text = (b != TEXT) | (k_number[None] == q_prompt[:, None])
    apart = (q_id[:, None] == k_id[None]) | (not own)
    if prompt is None:
        mine = k_id[None] == q_number[:, None]
    else:
        weight = torch.where(k_kind == GRID, k_number, 0)
        mine = shares[torch.where(q_kind == TEXT, q_number, 0)][:, weight] > 0
    grid_grid, text_grid = (a == GRID) & (b == GRID), (a == TEXT) & (b == GRID)
    return torch.where(grid_grid, apart, torch.where(text_grid, mine, text))


def definition(
    call: AttentionCall, config: RegionsConfig, layout: RegionLayout, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Attention of the batch items that the regions are for, in `dtype`; a row that sees nothing gives 0."""
    assert call.sequence is not None and call.parts is not None
    items = slice(*call.parts.rows)
    q, k, v = (t[items].to(dtype) for t in (call.q, call.k, call.v))
    ids, shares = layout.ids(call.sequence.grid), layout.shares(call.sequence.grid).to(dtype)
    own = config.self_attention == "masked"
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale

    def attend(prompt: int | None) -> torch.Tensor:
        mask = rule(call, ids, shares, own, prompt)
        scores = (q @ k.mT * scale).masked_fill(~mask, float("-inf"))
        return torch.nan_to_num(torch.softmax(scores, -1)) @ v

    if config.mode == "masked" or call.kind == "self":
        return attend(None)
    kinds, numbers, _, _ = tokens_of(call)
    out = torch.zeros_like(q)
    for prompt, share in enumerate(shares):
        on_grid = share[torch.where(kinds == GRID, numbers, 0)]
        weight = torch.where(kinds == GRID, on_grid, (numbers == prompt).to(dtype))  # others have the number 0
        out = out + attend(prompt) * weight[:, None]
    return out


def unconditional(call: AttentionCall, items: slice, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Dense attention of batch items as if there were no prompts but the first; the others' tokens give 0."""
    q_kind, q_number, k_kind, k_number = tokens_of(call)
    asks, seen = ((kind != TEXT) | (number == 0) for kind, number in ((q_kind, q_number), (k_kind, k_number)))
    q, k, v = (t[items].to(dtype) for t in (call.q, call.k, call.v))
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    scores = (q @ k.mT * scale).masked_fill(~seen, float("-inf"))
    return (torch.softmax(scores, -1) @ v).masked_fill(~asks[:, None], 0.0)
