"""Right at scale: sampled rows in float64 at up to 115,200 tokens, everything in float64 at 8,192.

The rows' mask is the window rule in arithmetic, which shares nothing with the library (tests/benchmarks proves it).
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from attn_plugins.ops import block_sparse_attention, neighborhood_attention
from attn_plugins.pipelines.benching.definitions.window_rule import WindowRule
from attn_plugins.pipelines.benching.oracle import SampledAttention
from tests.support.tolerance import sdpa

# grid, window, stride, text, heads, KV heads, head size, dtype
SCALE = {
    "hunyuan aligned": ((30, 48, 80), (18, 24, 24), (16, 8, 8), 0, 4, 4, 128, torch.bfloat16),
    "hunyuan stride 1": ((30, 48, 80), (18, 24, 24), (1, 1, 1), 0, 2, 2, 64, torch.bfloat16),
    "hunyuan wide": ((30, 48, 80), (30, 40, 40), (1, 32, 8), 0, 2, 2, 128, torch.float16),
    "hunyuan text": ((30, 48, 80), (18, 24, 24), (16, 8, 8), 256, 2, 2, 128, torch.bfloat16),
    "wan 720p": ((21, 45, 80), (15, 25, 56), (7, 15, 8), 0, 4, 4, 128, torch.bfloat16),
    "wan 480p": ((21, 30, 52), (13, 20, 39), (7, 10, 13), 0, 4, 4, 128, torch.float16),
    "flux": ((256, 256), (80, 80), (16, 16), 512, 4, 4, 128, torch.bfloat16),
    "flux stride 1": ((256, 256), (80, 80), (1, 1), 512, 2, 2, 64, torch.bfloat16),
    "1-D": ((32768,), (2048,), (1,), 0, 4, 4, 128, torch.bfloat16),
    "1-D grouped": ((32767,), (2049,), (7,), 3, 8, 2, 64, torch.bfloat16),
    "fp32": ((16, 32, 32), (8, 16, 16), (1, 1, 1), 5, 2, 2, 64, torch.float32),
}


def shrunk(rule: WindowRule) -> WindowRule:
    """The same kind of problem for a rehearsal."""
    sizes = tuple(min(size, {1: 200, 2: 14, 3: 6}[len(rule.grid)]) for size in rule.grid)
    window = tuple(max(1, k * n // size) for k, n, size in zip(rule.window, sizes, rule.grid, strict=True))
    stride = tuple(min(s, k) for s, k in zip(rule.stride, window, strict=True))
    return WindowRule(sizes, window, stride, min(rule.text, 5))


def attend(rule: WindowRule, backend: str):
    return partial(
        neighborhood_attention,
        grid=rule.grid, window=rule.window, stride=rule.stride, text_after=rule.text, backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("problem", SCALE.values(), ids=SCALE)
def test_sampled_rows_and_all_gradients_at_scale(place, problem):
    *rule, heads, kv_heads, head_dim, dtype = problem
    rule = shrunk(WindowRule(*rule)) if place.tiny else WindowRule(*rule)
    leaves = place.qkv(rule.length, head_dim, dtype, heads, kv_heads)
    verdict = SampledAttention(leaves, rule.mask_rows).judge(attend(rule, place.backend), gradients=True)
    assert verdict.right, verdict.errors


def test_offsets_beyond_two_billion_elements(place, room):
    """A batch whose last item lies behind 2**31 elements of q: a 32-bit offset would wrap."""
    room(110)
    rule = WindowRule((30, 48, 80), (18, 24, 24), (16, 8, 8))
    rule, batch, heads = (shrunk(rule), 2, 2) if place.tiny else (rule, 7, 24)
    leaves = place.qkv(rule.length, 128, torch.bfloat16, heads, batch=batch)
    assert place.tiny or leaves[0].numel() > 2**31
    verdict = SampledAttention(leaves, rule.mask_rows).judge(attend(rule, place.backend), gradients=True)
    assert verdict.right, verdict.errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("share", [0.05, 0.5])
def test_every_row_and_every_gradient_of_random_lists(place, share, dtype):
    """Nothing sampled: two heads with lists of their own, 8,192 tokens, against float64."""
    blocks = 6 if place.tiny else 128
    plan = place.lists_plan(blocks, share, heads=2)
    q, k, v = place.qkv(plan.q_length, 64, dtype, heads=2, grad=True)
    mask = plan.to_mask().to(place.device)
    place.check(
        lambda *t: block_sparse_attention(*t, plan, backend=place.backend), lambda *t: sdpa(*t, mask, None), (q, k, v)
    )
