"""The CPU backend: the computed rows of a head gathered, or all of them where that is faster, over views of the keys.

Causal rows go in chunks: the keys before a chunk are seen whole by all of its rows, so that only those among its rows
need a mask. Plain PyTorch: it runs on any device. The backward takes the same parts, each with the output and LSE of
all; dense parts take all rows there too, those not wanted with a gradient of 0.
"""

from __future__ import annotations

import itertools

import torch

from attn_plugins.ops.block_sparse.tile_attention import attend, attend_backward
from attn_plugins.ops.routed_heads.inputs import host_bounds, query_offset, real_rows
from attn_plugins.ops.routed_heads.jobs import Job, jobs_of, plainly_dense
from attn_plugins.ops.routed_heads.rows import Rows, flat
from attn_plugins.ops.routed_heads.tiles import Dense, Gathered

TURNS = 4  # in which the heads of a job go in the backward, for what each makes of the keys

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Tiles = Gathered | Dense


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: torch.Tensor,
    mask: torch.Tensor,
    bounds: torch.Tensor | None,
    causal: bool,
    scale: float,
    keep: bool,
) -> Triple:
    """q (B, H, N, D), k and v (B, H_kv, N_kv, D), gates (B, N, H), mask (B, N, H) of what to compute.

    Returns the output in q's memory layout, and for a backward (`keep`) attention without gates, like it, and the LSE
    (B, H, N), +inf where nothing was computed; else both are empty.
    """
    found = _Work(q, k, mask, bounds, causal)
    weights = gates.transpose(1, 2)[..., None]
    wide = torch.promote_types(q.dtype, torch.float32)
    if found.everything and not keep:
        whole, whole_lse = attend(q, k, v, None, scale, causal)
        if any(job.partial for job in found.jobs):
            skipped = ~found.mask.transpose(1, 2)[..., None]
            weights = weights.masked_fill(skipped, 0.0)
            # Times 0 they are 0, unless something is not finite: sums tell, without another pass over all rows.
            if not bool(torch.isfinite(whole_lse.sum() + v.sum(dtype=wide))):
                whole.masked_fill_(skipped, 0.0)
        whole.mul_(weights)
        return _laid_out(whole, q), q.new_empty(0), q.new_empty(0, dtype=wide)
    out = _room_like(q, zero=True)
    attention = torch.zeros_like(out) if keep else q.new_empty(0)
    lse = q.new_full(q.shape[:3] if keep else (0,), float("inf"), dtype=wide)
    for job in found.jobs:
        tiles = found.tiles(job)
        rows = tiles.read(q)
        found_out, found_lse = _attend(tiles, rows, k, v, scale)
        del rows
        if keep:
            kept = tiles.clean(found_out)
            tiles.write(attention, kept.to(q.dtype))
            if isinstance(tiles, Dense) and tiles.unwanted is not None:
                found_lse = found_lse.masked_fill(tiles.unwanted[..., 0], float("inf"))
            tiles.write(lse[..., None], found_lse[..., None])
        # In place, and so rounded once, to q's precision: a product of 16 bits with gates of 32 would be of 32.
        gated = found_out.mul_(tiles.read(weights))
        tiles.write(out, tiles.wanted(gated).to(q.dtype))
    return _laid_out(out, q), _laid_out(attention, q) if keep else attention, lse


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: torch.Tensor,
    attention: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor,
    bounds: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v. Jobs come in one fixed order: the same call gives the same bits."""
    found = _Work(q, k, mask, bounds, causal)
    weights = gates.transpose(1, 2)[..., None]
    grad_q = _room_like(q, zero=True)
    sums = [torch.zeros_like(t, dtype=lse.dtype) for t in (k, v)]
    step = max(torch.get_num_threads(), -(-k.shape[1] // TURNS))
    for job in itertools.chain.from_iterable(whole.pieces(step) for whole in found.jobs):
        tiles = found.tiles(job)
        upstream = tiles.wanted((tiles.read(grad) * tiles.read(weights)).to(q.dtype))
        rows, out, row_lse = tiles.clean(tiles.read(q)), tiles.read(attention), tiles.read(lse[..., None])[..., 0]
        grad_rows = None
        for part in job.parts:
            grads = attend_backward(
                upstream, None, rows, tiles.keys(k, part), tiles.keys(v, part), out, row_lse,
                tiles.bias(part, q.dtype), scale, part.causal,
            )  # fmt: skip
            share = grads[0] if len(job.parts) == 1 else grads[0].to(lse.dtype)
            grad_rows = share if grad_rows is None else grad_rows.add_(share)
            for total, of_part in zip(sums, grads[1:], strict=True):
                tiles.add(total, part, of_part)
        assert grad_rows is not None  # a job has at least one part
        tiles.write(grad_q, grad_rows.to(q.dtype))
    grad_k, grad_v = (_laid_out(total.to(t.dtype), t) for t, total in zip((k, v), sums, strict=True))
    return _laid_out(grad_q, q), grad_k, grad_v


class _Work:
    """The work of a call, and whether it is one dense call."""

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, bounds: torch.Tensor | None, causal: bool
    ) -> None:
        self.limits = host_bounds(bounds, q.shape[0], k.shape[2])
        self.mask = real_rows(mask, bounds, k.shape[2], causal)
        dense = plainly_dense(self.mask, self.limits, k.shape[2], q.shape[1] // k.shape[1]) if causal else []
        self.rows = None if dense else Rows.of(self.mask, k.shape[1])
        self.jobs = dense if self.rows is None else jobs_of(self.rows, self.limits, q, k, causal)
        self.kv_heads = k.shape[1]
        self.offset = query_offset(q.shape[2], k.shape[2], causal) or 0
        square = not causal or q.shape[2] == k.shape[2]
        self.everything = (
            bounds is None
            and square
            and q.shape[1] == k.shape[1]
            and len(self.jobs) == q.shape[0]
            and all(job.starts is None and len(job.kv) == k.shape[1] for job in self.jobs)
        )

    def tiles(self, job: Job) -> Tiles:
        if job.starts is None:
            return Dense(job, self.mask, self.kv_heads)
        assert self.rows is not None  # of which the job's are some
        return Gathered(job, self.rows, self.offset)


def _attend(
    tiles: Tiles, rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE of all parts of a job; each row sees a key of every part."""
    out: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    for part in tiles.job.parts:
        bias = tiles.bias(part, rows.dtype)
        found, found_lse = attend(rows, tiles.keys(k, part), tiles.keys(v, part), bias, scale, part.causal)
        if out is None or lse is None:
            out, lse = found, found_lse
        else:
            weight = torch.sigmoid(found_lse - lse)[..., None]
            out = torch.lerp(out.to(weight.dtype), found.to(weight.dtype), weight)
            lse = torch.logaddexp(lse, found_lse)
    assert out is not None and lse is not None  # a job has at least one part
    return out, lse


def _room_like(q: torch.Tensor, zero: bool) -> torch.Tensor:
    """For results, in q's layout where rows can be written to that, which is nearly always."""
    room = torch.empty_like(q)
    if flat(room) is None:
        room = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return room.zero_() if zero else room


def _laid_out(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The same numbers in the memory layout that a result for another tensor has."""
    want = torch.empty_like(like)
    return t if t.stride() == want.stride() else want.copy_(t)
