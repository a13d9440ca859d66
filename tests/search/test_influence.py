"""Influence in tiles against autograd: the loss is linear in the output, so that first order is all there is."""

from __future__ import annotations

import pytest
import torch

from attn_plugins.search import block_influence, hidden_loss, window_influence


def problem(heads: int, groups: int, tokens: int, channels: int = 8, dtype: torch.dtype = torch.float64):
    draw = torch.Generator().manual_seed(heads * 100 + tokens)
    q, grad = (torch.randn(heads, tokens, channels, generator=draw, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(groups, tokens, channels, generator=draw, dtype=dtype) for _ in range(2))
    return q, k, v, grad


def weights_of(q, k, scale):
    k = k.repeat_interleave(q.shape[0] // k.shape[0], 0)
    scores = (q @ k.mT) * scale
    return scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), float("-inf")).softmax(-1)


def pairs_by_autograd(q, k, v, grad, scale):
    """(H, N, N): the derivative of the loss by a gate m_ij on the weights, renormalised, from m = 1 to m = 0.

    The loss dO . (sum m A V / sum m A) is no straight line in m_ij, so the derivative is scaled from the slope at 1 to
    the chord: hiding a key of weight A changes the sum below to 1 - A.
    """
    v = v.repeat_interleave(q.shape[0] // v.shape[0], 0)
    a = weights_of(q, k, scale)
    gate = torch.ones_like(a, requires_grad=True)
    masked = gate * a
    loss = (grad * ((masked @ v) / masked.sum(-1, keepdim=True))).sum()
    slope = torch.autograd.grad(loss, gate)[0]
    return -slope / (1 - a).masked_fill(a == 1, 1.0)


def pairs_by_hiding(q, k, v, grad, scale):
    """(H, N, N): each pair hidden in turn, by its definition."""
    v = v.repeat_interleave(q.shape[0] // v.shape[0], 0)
    a = weights_of(q, k, scale)
    found = torch.zeros_like(a)
    for j in range(a.shape[-1]):
        left = a.clone()
        left[..., j] = 0
        total = left.sum(-1, keepdim=True)
        out = (left / total.masked_fill(total == 0, 1.0)) @ v
        change = (grad * (out - a @ v)).sum(-1)
        found[..., j] = change.masked_fill(total[..., 0] == 0, 0.0)
    return found


def blocks_of(pairs: torch.Tensor, block: int) -> torch.Tensor:
    n = -(-pairs.shape[-1] // block)
    found = pairs.new_zeros(*pairs.shape[:-2], n, n)
    for a in range(n):
        for b in range(n):
            piece = pairs[..., a * block : (a + 1) * block, b * block : (b + 1) * block]
            found[..., a, b] = piece.abs().sum((-2, -1))
    return found


@pytest.mark.parametrize("oracle", [pairs_by_autograd, pairs_by_hiding])
@pytest.mark.parametrize(("heads", "groups", "tokens", "block"), [(2, 2, 32, 8), (4, 2, 40, 16), (6, 1, 37, 8)])
def test_tiles_are_what_autograd_and_hiding_say(oracle, heads, groups, tokens, block):
    q, k, v, grad = problem(heads, groups, tokens)
    expected = blocks_of(oracle(q, k, v, grad, 0.3), block)
    found = block_influence(q, k, v, grad, scale=0.3, block=block)
    assert found.shape == expected.shape and float(expected.max()) > 1
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def windows_by_hiding(q, k, v, grad, scale, block, sink):
    """(H, n + 1): every window applied to the weights, by its definition; its size row by row."""
    v = v.repeat_interleave(q.shape[0] // v.shape[0], 0)
    a = weights_of(q, k, scale)
    where = torch.arange(a.shape[-1]) // block
    n = int(where.max()) + 1
    found = []
    for span in range(1, n + 1):
        left = a * ((where < sink) | (where[:, None] - where < span))
        out = (left / left.sum(-1, keepdim=True)) @ v
        found.append((grad * (out - a @ v)).sum(-1).abs().sum(-1))
    return torch.stack(found, -1)


@pytest.mark.parametrize("sink", [0, 1, 2])
@pytest.mark.parametrize(("heads", "groups", "tokens", "block"), [(2, 2, 32, 8), (4, 2, 40, 8), (6, 1, 37, 8)])
def test_windows_are_what_hiding_all_of_it_says(heads, groups, tokens, block, sink):
    q, k, v, grad = problem(heads, groups, tokens)
    expected = windows_by_hiding(q, k, v, grad, 0.3, block, sink)
    maps = window_influence(q, k, v, grad, scale=0.3, block=block, sink=sink, workspace=1)
    found = hidden_loss(maps, range(1, expected.shape[-1] + 1), sink=sink)
    assert float(expected.max()) > 1
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_windows_where_one_key_has_all_the_weight_stay_exact_in_single_precision():
    q, k, v, grad = problem(2, 2, 64, dtype=torch.float32)
    expected = windows_by_hiding(*(t.double() for t in (20 * q, k, v, grad)), 8**-0.5, 16, 1)
    found = hidden_loss(window_influence(20 * q, k, v, grad, block=16), range(1, 5))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_pairs_bound_windows_of_little_weight():
    """Where each row's weight is spread, the pairs' sizes add up to no less than the whole's."""
    q, k, v, grad = problem(2, 1, 64)
    pairs = hidden_loss(block_influence(0 * q, k, v, grad, block=8), range(1, 8))
    windows = hidden_loss(window_influence(0 * q, k, v, grad, block=8), range(1, 8))
    assert bool((windows[:, :6] < pairs[:, :6]).all())


@pytest.mark.parametrize("workspace", [1, 4 * 37 * 8 * 2, 1 << 24])
def test_the_height_of_a_strip_changes_nothing(workspace):
    q, k, v, grad = problem(4, 2, 37)
    whole = block_influence(q, k, v, grad, block=8)
    torch.testing.assert_close(block_influence(q, k, v, grad, block=8, workspace=workspace), whole, rtol=1e-12, atol=0)


def test_a_rows_gradient_stays_in_its_row_of_blocks():
    q, k, v, grad = problem(2, 1, 32)
    grad[:, :16] = 0
    found = block_influence(q, k, v, grad, block=8)
    assert float(found[:, :2].abs().max()) == 0 and float(found[:, 2:].tril().amax((1, 2)).min()) > 0
    assert float(found.triu(1).abs().max()) == 0


def test_weights_of_one_in_single_precision_stay_finite():
    q, k, v, grad = problem(2, 2, 64, dtype=torch.float32)
    q = 100 * q
    assert float((weights_of(q, k, 8**-0.5).amax(-1) == 1).float().mean()) > 0.5
    found = block_influence(q, k, v, grad, block=16)
    expected = block_influence(*(t.double() for t in (q, k, v, grad)), block=16)
    assert found.dtype == torch.float32
    # scores of several hundred carry a rounding of 3e-5 into the exponent
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_memory_is_a_strip_not_a_matrix():
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            seen.extend([out.numel()] if isinstance(out, torch.Tensor) else [])
            return out

    q, k, v, grad = problem(2, 1, 512)
    with Watch():
        block_influence(q, k, v, grad, block=16, workspace=1)
    assert 2 * 16 * 512 <= max(seen) < 2 * 512 * 512 / 8


def test_shapes_that_do_not_go_together_are_named():
    q, k, v, grad = problem(3, 3, 16)
    with pytest.raises(ValueError, match=r"k \(2, 16, 8\)"):
        block_influence(q, k[:2], v[:2], grad)
    with pytest.raises(ValueError, match=r"dO \(3, 15, 8\)"):
        block_influence(q, k, v, grad[:, :15])
