"""The choice of blocks as operators of a compiled graph: opaque, without gradient, the same bits in eager mode."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch

from attn_plugins.ops.vmoba import triton
from attn_plugins.ops.vmoba.gate import gate_scores, pool
from attn_plugins.ops.vmoba.layout import Layout, decode
from attn_plugins.ops.vmoba.selection import Selection, kept, ranked
from attn_plugins.ops.vmoba.tables import own_blocks

_TYPES = (
    "(Tensor q, Tensor k, SymInt[] spec, str rule, str scope, SymInt[] bounds, float tau, float scale, str backend)"
)


@torch.library.custom_op("attn_plugins::vmoba_tiles", mutates_args=(), schema=f"{_TYPES} -> (Tensor, Tensor)")
def _tiles(q, k, spec, rule, scope, bounds, tau, scale, backend):  # type: ignore[no-untyped-def]
    how = _selection(rule, scope, bounds, tau)
    one = decode(spec)[0][1]
    own = own_blocks(one, False, q.device)
    scores = block_scores(q, k, one, False, backend)
    order = ranked(scores, own)
    count = kept(scores, own, order, how, scale)
    return order[..., : how.width(one.count)].to(torch.int32, memory_format=torch.contiguous_format), count.int()


@_tiles.register_fake
def _(q, k, spec, rule, scope, bounds, tau, scale, backend):  # type: ignore[no-untyped-def]
    one = decode(spec)[0][1]
    count = q.new_empty(q.shape[0], q.shape[1], len(one.tiles.sizes), dtype=torch.int32)
    return count.new_empty(*count.shape, _selection(rule, scope, bounds, tau).width(one.count)), count


@torch.library.custom_op("attn_plugins::vmoba_tokens", mutates_args=(), schema=f"{_TYPES} -> Tensor")
def _tokens(q, k, spec, rule, scope, bounds, tau, scale, backend):  # type: ignore[no-untyped-def]
    one, how = decode(spec)[0][1], _selection(rule, scope, bounds, tau)
    number = how.number(one.count)
    if backend == "triton" and number is not None:
        found = triton.best_blocks(q, k, one, number)
        if found is not None:
            return found
    own = own_blocks(one, True, q.device)
    scores = block_scores(q, k, one, True, backend)
    order = ranked(scores, own)
    count = kept(scores, own, order, how, scale)
    first = torch.arange(one.count, device=q.device) < count[..., None]
    return torch.zeros_like(first).scatter_(-1, order, first)


@_tokens.register_fake
def _(q, k, spec, rule, scope, bounds, tau, scale, backend):  # type: ignore[no-untyped-def]
    one = decode(spec)[0][1]
    return q.new_empty(*q.shape[:2], one.sequence.tokens, one.count, dtype=torch.bool)


def choose_for_tiles(
    q: torch.Tensor, k: torch.Tensor, spec: Rows[int], how: Selection, scale: float, backend: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(lists (B, H, tiles, L), count (B, H, tiles)), int32: the best blocks of each query tile, its own first."""
    return _tiles(q.detach(), k.detach(), spec, *_plain(how), scale, backend)


def choose_for_tokens(
    q: torch.Tensor, k: torch.Tensor, spec: Rows[int], how: Selection, scale: float, backend: str = "cpu"
) -> torch.Tensor:
    """(B, H, grid tokens, blocks) bool: the blocks of each query, in raster order of queries."""
    return _tokens(q.detach(), k.detach(), spec, *_plain(how), scale, backend)


def block_scores(q: torch.Tensor, k: torch.Tensor, one: Layout, exact: bool, backend: str) -> torch.Tensor:
    """(B, H, rows, blocks), at least float32: of each grid query (`exact`), or of the mean of each tile of them."""
    if backend == "triton":
        return triton.gate_scores(q, k, one, exact)
    with torch.autocast(q.device.type, enabled=False):
        if exact:
            rows = q.narrow(2, one.sequence.text_before, one.sequence.tokens)
            rows = rows.to(torch.promote_types(q.dtype, torch.float32))
        else:
            rows = pool(q, one.tiles)
        return gate_scores(rows, pool(k, one.blocks))


def _plain(how: Selection) -> tuple[str, str, list[int], float]:
    """A selection as a custom op takes it."""
    bounds = [how.k_blocks or 0, how.min_blocks, how.max_blocks or 0]
    return how.rule, how.scope, bounds, 0.0 if how.tau is None else float(how.tau)


def _selection(rule: str, scope: str, bounds: Rows[int], tau: float) -> Selection:
    k_blocks, min_blocks, max_blocks = (int(bound) for bound in bounds)
    return Selection(rule, scope, k_blocks or None, tau, min_blocks, max_blocks or None)
