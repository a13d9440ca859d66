"""VMoBA at the size of a video: both forms against dense attention with their mask, the same bits twice, no sync."""

from __future__ import annotations

import math

import pytest
import torch

from attn_plugins.ops import vmoba_attention
from attn_plugins.ops.vmoba.causal import causal_block_attention
from attn_plugins.ops.vmoba.choice import choose_for_tiles, choose_for_tokens
from attn_plugins.ops.vmoba.layout import Layout, decode, encode, fit_tile
from attn_plugins.ops.vmoba.selection import Selection
from attn_plugins.sequence import Sequence
from tests.gpu.test_sync import no_sync
from tests.support.tolerance import sdpa

TILE = 256
RULES = [("topk", "query", {"k_blocks": 3}), ("threshold", "head", {"tau": 0.25}), ("top_p", "query", {"tau": 0.5})]


def problem(place):
    """Grid and block of some 4,000 tokens: 18 blocks, ragged on each axis."""
    return ((3, 4, 3), (2, 2, 2)) if place.tiny else ((11, 17, 23), (4, 6, 10))


def layout(grid, block) -> tuple[list[int], Layout]:
    spec = encode(Sequence(grid), block, fit_tile(block, TILE))
    return spec, decode(spec)[0][1]


def rows_of(choice, one):
    """(B, H, tokens, blocks) bool of what either `choose_for_...` gives."""
    if isinstance(choice, torch.Tensor):
        return choice
    lists, count = choice
    first = torch.arange(lists.shape[-1], device=lists.device) < count[..., None]
    table = torch.zeros(*lists.shape[:3], one.count, dtype=torch.bool, device=lists.device)
    return table.scatter_(-1, lists.long(), first)[:, :, one.tile_of.to(lists.device)]


@pytest.mark.parametrize("exact", [False, True], ids=["pooled", "exact"])
@pytest.mark.parametrize(("rule", "scope", "number"), RULES)
def test_the_choice_is_that_of_pytorch(place, rule, scope, number, exact):
    """But for pairs that float32 sums in another order put the other way round: fewer than one in 10,000."""
    grid, block = problem(place)
    q, k, _ = place.qkv(math.prod(grid), 64, torch.bfloat16, kv_heads=2)
    spec, one = layout(grid, block)
    choose = choose_for_tokens if exact else choose_for_tiles
    ours, theirs = (
        rows_of(choose(q, k, spec, Selection(rule, scope, **number), 0.125, way), one) for way in (place.backend, "cpu")
    )
    assert (ours != theirs).float().mean().item() < 1e-4


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("exact", [False, True], ids=["pooled", "exact"])
def test_against_float64(place, exact, dtype, head_dim, room):
    room(12)
    grid, block = problem(place)
    leaves = place.qkv(math.prod(grid), head_dim, dtype, kv_heads=2, grad=True)
    spec, one = layout(grid, block)
    choose = choose_for_tokens if exact else choose_for_tiles
    made = choose(*leaves[:2], spec, Selection(k_blocks=3), head_dim**-0.5, place.backend)
    mask = rows_of(made, one)[..., one.own[one.tile_of].to(place.device)]
    options = {"grid": grid, "block": block, "k_blocks": 3, "tile": TILE, "exact": exact}
    place.check(
        lambda *t: vmoba_attention(*t, **options, backend=place.backend),
        lambda *t: sdpa(*t, mask, None),
        leaves,
    )


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_causal_text_against_float64(place, head_dim):
    tokens, block = (70, 16) if place.tiny else (3000, 256)
    leaves = place.qkv(tokens, head_dim, torch.bfloat16, kv_heads=2, grad=True)
    spec = encode(Sequence((tokens,)), (block,), (block,))
    chosen = torch.ops.attn_plugins.moba_tokens(*(t.detach() for t in leaves[:2]), spec, 3, place.backend)
    mask = chosen[..., torch.arange(tokens, device=place.device) // block]
    mask = mask & torch.ones(tokens, tokens, dtype=torch.bool, device=place.device).tril()
    place.check(
        lambda *t: causal_block_attention(*t, block=block, k_blocks=3, backend=place.backend),
        lambda *t: sdpa(*t, mask, None),
        leaves,
    )


@pytest.mark.parametrize("exact", [False, True], ids=["pooled", "exact"])
def test_ten_times_the_same_bits(place, exact):
    """Running sums go to memory and back: a barrier too few would show here."""
    grid, block = problem(place)
    leaves = place.qkv(math.prod(grid), 128, torch.bfloat16, grad=True)

    def step():
        options = {"grid": grid, "block": block, "k_blocks": 3, "exact": exact, "backend": place.backend}
        out = vmoba_attention(*leaves, **options)
        return out, *place.grads(out, leaves)

    first = step()
    for _ in range(1 if place.tiny else 9):
        assert all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))


@pytest.mark.parametrize("exact", [False, True], ids=["pooled", "exact"])
@pytest.mark.parametrize(("rule", "scope", "number"), RULES)
def test_no_call_waits_for_the_device(place, on_gpu, rule, scope, number, exact):
    grid, block = problem(place)
    leaves = place.qkv(math.prod(grid) + 7, 64, torch.bfloat16, grad=True)
    upstream = torch.randn_like(leaves[0])

    def step():
        options = {"grid": grid, "block": block, "rule": rule, "scope": scope, "exact": exact, "text_after": 7}
        torch.autograd.grad(vmoba_attention(*leaves, **options, **number, backend="triton"), leaves, upstream)

    step()  # compiles the kernels, uploads the layout
    with no_sync():
        step()
