"""Memory beyond inputs and results: at most twice q, k, v, by the GPU's own allocator."""

from __future__ import annotations

import pytest
import torch

from attn_plugins.ops import neighborhood_attention

SETTINGS = {
    "aligned": {"grid": (16, 48, 80), "window": (8, 24, 24), "stride": (8, 8, 8)},
    "stride 1": {"grid": (16, 48, 80), "window": (9, 25, 25)},
    "1-D": {"grid": (32768,), "window": 2048},
    "text": {"grid": (128, 128), "window": (40, 40), "stride": (16, 16), "text_after": [[512, 100]]},
    "whole": {"grid": (32768,), "window": -1},
}


def nbytes(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def peak(call):
    """Bytes allocated at most during the second of two calls, and what it returned (the first makes the plan)."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, result


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_at_most_twice_q_k_v(place, on_gpu, setting, head_dim):
    text = setting.get("text_after", [[0]])[0][0]
    tokens = torch.Size(setting["grid"]).numel() + text
    leaves = place.qkv(tokens, head_dim, torch.bfloat16, heads=8, grad=True)
    budget = 2 * nbytes(*leaves)

    def forward():
        return neighborhood_attention(*leaves, **setting, backend=place.backend, return_lse=True)

    most, (out, lse) = peak(forward)
    assert most - nbytes(out, lse) <= budget, f"forward: {(most - nbytes(out, lse)) / budget:.2f} of the budget"
    upstream = torch.randn_like(out)
    most, grads = peak(lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True))
    assert most - nbytes(*grads) <= budget, f"backward: {(most - nbytes(*grads)) / budget:.2f} of the budget"


def test_a_plan_at_115200_tokens_is_small(place, on_gpu):
    """What stays on the GPU after a first call: the plan's tables, at stride 1 the largest there are."""
    leaves = place.qkv(115200, 64, torch.bfloat16, heads=1, grad=True)
    options = {"grid": (30, 48, 80), "window": (18, 24, 24), "backend": place.backend}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    place.grads(neighborhood_attention(*leaves, **options), leaves)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before <= 256 << 20
