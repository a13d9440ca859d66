"""Memory beyond what goes in: live storage, counted byte by byte at every operation, never timed or sampled."""

import pytest
import torch

from attn_plugins.ops import neighborhood_attention
from tests.support.live_bytes import LiveBytes

HEADS, DIM = 4, 64


def nbytes(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def test_the_counter_counts_what_lives():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a * 2 + a.view(10, 100).sum(0, keepdim=True).new_zeros(1000)
        del a, b
        c = torch.zeros(10)
    assert live.peak >= 3 * 4000 and live.now == nbytes(c)


def test_the_counter_sees_inside_our_operators():
    q = torch.randn(1, 1, 64, 8)
    with LiveBytes([q]) as live:
        out = neighborhood_attention(q, q, q, grid=(8, 8), window=3)
    assert live.peak > nbytes(out) + nbytes(q)  # the keys that it gathered


SETTINGS = {
    "strided": {"grid": (8, 32, 32), "window": (4, 16, 16), "stride": (2, 8, 8)},
    "stride 1": {"grid": (8, 32, 32), "window": (5, 13, 13)},
    "1-D": {"grid": (8192,), "window": 1024, "stride": 256},
    "text": {"grid": (8, 32, 31), "window": (8, 12, 12), "text_after": [[256, 100]]},
    "whole": {"grid": (8192,), "window": -1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_forward_and_backward_take_at_most_twice_q_k_v(setting, dtype):
    """Beyond what goes in and what comes out. Scores of N x N would take 170 times q, k, v."""
    tensors = [torch.randn(1, 8192, HEADS, DIM, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]
    budget = 2 * nbytes(*tensors)
    with LiveBytes(tensors) as live:
        out, lse = neighborhood_attention(*tensors, **setting, return_lse=True)
    extra = live.peak - nbytes(out, lse)
    assert 0 < extra <= budget
    upstream = [torch.randn_like(out), torch.zeros_like(lse)]
    with LiveBytes([*tensors, out, lse, *upstream]) as live:
        grads = torch.autograd.grad((out, lse), tensors, upstream)
    extra_backward = live.peak - nbytes(*grads)
    print(f"beyond the results: {extra / budget * 2:.2f} and {extra_backward / budget * 2:.2f} times q, k, v")
    assert 0 < extra_backward <= budget
